-- Named queries of API keys; loaded by serve_app/identity/api_keys.py. A row with `replaced_by` is
-- an earlier secret of the key that it names, and no key of its own.

-- name: lock_owner
-- Until the end of the transaction: how many keys an owner may have is counted by one at a time.
select pg_advisory_xact_lock(hashtextextended('comp_ai.api_keys of ' || $1, 0));

-- name: count_valid
select count(*) from comp_ai.api_keys
where owner = $1 and replaced_by is null and revoked_at is null
  and (expires_at is null or expires_at > now());

-- name: add
insert into comp_ai.api_keys
    (id, prefix, secret_hash, name, note, owner, permissions, models, limits, bodies,
     created_at, created_by, expires_at)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9::jsonb, $10, $11, $12, $13)
returning *;

-- name: find
select * from comp_ai.api_keys where prefix = any($1::text[]);

-- name: get
select * from comp_ai.api_keys
where id = $1 and replaced_by is null and ($2::text is null or owner = $2);

-- name: lock
select * from comp_ai.api_keys
where id = $1 and replaced_by is null and ($2::text is null or owner = $2)
for update;

-- name: list_desc
select * from comp_ai.api_keys
where replaced_by is null and ($1::text is null or owner = $1) and ($2::uuid is null or id < $2)
order by id desc limit $3;

-- name: list_asc
select * from comp_ai.api_keys
where replaced_by is null and ($1::text is null or owner = $1) and ($2::uuid is null or id > $2)
order by id limit $3;

-- name: earlier_secrets
select * from comp_ai.api_keys
where replaced_by = any($1::uuid[]) and revoked_at is null and expires_at > now()
order by expires_at desc, id desc;

-- name: change
update comp_ai.api_keys
set name = $2, note = $3, permissions = $4, models = $5, limits = $6::jsonb, bodies = $7,
    expires_at = $8
where id = $1
returning *;

-- name: change_earlier
-- What a key may do it may do with each of its secrets, and none outlives it.
update comp_ai.api_keys
set permissions = $2, models = $3, limits = $4::jsonb, bodies = $5,
    expires_at = least(expires_at, $6)
where replaced_by = $1;

-- name: end_earlier
update comp_ai.api_keys set expires_at = least(expires_at, $2) where replaced_by = $1;

-- name: drop_ended
delete from comp_ai.api_keys where replaced_by = $1 and expires_at <= $2;

-- name: renew
update comp_ai.api_keys
set prefix = $2, secret_hash = $3, rotated_at = $4, expires_at = least(expires_at, $5)
where id = $1
returning *;

-- name: keep_earlier
insert into comp_ai.api_keys
    (id, prefix, secret_hash, name, owner, permissions, models, limits, bodies,
     created_at, created_by, expires_at, last_used_at, replaced_by)
select $1, $2, $3, name, owner, permissions, models, limits, bodies,
       created_at, created_by, least(expires_at, $4), $5, id
from comp_ai.api_keys where id = $6;

-- name: revoke
update comp_ai.api_keys set revoked_at = coalesce(revoked_at, $2)
where id = $1 or replaced_by = $1;

-- name: keep_out_holds
-- Who sets a hold waits for the end of this: a hold that was answered is kept.
lock table comp_ai.legal_holds in share mode;

-- name: count_ended
-- What `sweep_ended` removes, and what it leaves because its owner is held.
select count(*) filter (where not held) as rows, count(*) filter (where held) as held_rows
from (
    select exists (
        select from comp_ai.legal_holds h
        where h.subject = k.owner and h.released_at is null) as held
    from comp_ai.api_keys k
    where least(k.revoked_at, k.expires_at) < now() - make_interval(days => $1)
) as ended;

-- name: sweep_ended
-- Keys that ended more than $1 days ago, and earlier secrets; none of a subject that is held. With
-- a key go its earlier secrets.
delete from comp_ai.api_keys
where id = any(array(
    select k.id from comp_ai.api_keys k
    where least(k.revoked_at, k.expires_at) < now() - make_interval(days => $1)
      and not exists (
          select from comp_ai.legal_holds h where h.subject = k.owner and h.released_at is null)
    limit $2));

-- name: mark_used
-- Several gateways write the same rows: taking the locks in one order keeps them from deadlock.
with used as (
    select keys.id, marks.at
    from comp_ai.api_keys as keys
    join unnest($1::uuid[], $2::timestamptz[]) as marks (id, at) using (id)
    where keys.last_used_at is null or keys.last_used_at < marks.at
    order by keys.id
    for no key update of keys
)
update comp_ai.api_keys as keys set last_used_at = used.at
from used where keys.id = used.id;
