-- Named queries of the stored responses; loaded by serve_app/stored/responses.py.

-- name: insert_response
insert into comp_ai.responses
    (id, principal_id, model, status, background, previous_id, expires_at, heartbeat_at,
     key_id, sealed, items_key_id, sealed_items)
values ($1, $2, $3, $4, $5, $6, now() + make_interval(secs => $7), case when $5 then now() end,
        $8, $9, $10, $11);

-- name: prolong
-- A conversation that goes on is kept whole.
update comp_ai.responses
set expires_at = greatest(expires_at, now() + make_interval(secs => $2))
where id = any($1::text[]);

-- name: find_response
select id, response, key_id, sealed,
       background and status in ('queued', 'in_progress')
           and heartbeat_at < now() - make_interval(secs => $3) as abandoned
from comp_ai.responses
where id = $1 and principal_id = $2 and expires_at > now();

-- name: chain
-- The response $1 and what it continues, oldest first, up to $3 responses or $4 bytes.
with recursive chain as (
    select r.id, r.status, r.previous_id, r.response, r.key_id, r.sealed,
           r.input_items, r.items_key_id, r.sealed_items, 1 as depth,
           coalesce(octet_length(r.sealed), octet_length(r.response))::bigint
               + coalesce(octet_length(r.sealed_items), octet_length(r.input_items)) as bytes
    from comp_ai.responses r
    where r.id = $1 and r.principal_id = $2 and r.expires_at > now()
    union all
    select r.id, r.status, r.previous_id, r.response, r.key_id, r.sealed,
           r.input_items, r.items_key_id, r.sealed_items, c.depth + 1,
           c.bytes + coalesce(octet_length(r.sealed), octet_length(r.response))
               + coalesce(octet_length(r.sealed_items), octet_length(r.input_items))
    from comp_ai.responses r
    join chain c on r.id = c.previous_id
    where r.principal_id = $2 and r.expires_at > now() and c.depth <= $3 and c.bytes <= $4
)
select id, status, previous_id, response, key_id, sealed, input_items, items_key_id, sealed_items,
       depth, bytes
from chain
order by depth desc;

-- name: delete_response
delete from comp_ai.responses
where id = $1 and principal_id = $2 and expires_at > now()
returning id;

-- name: lock_background
select id, response, key_id, sealed, background,
       background and status in ('queued', 'in_progress')
           and heartbeat_at < now() - make_interval(secs => $3) as abandoned
from comp_ai.responses
where id = $1 and principal_id = $2 and expires_at > now()
for update;

-- name: advance
-- A response that was cancelled or deleted meanwhile is left as it is.
update comp_ai.responses
set status = $2, key_id = $3, sealed = $4, response = null, updated_at = now(), heartbeat_at = now()
where id = $1 and status in ('queued', 'in_progress')
returning id;

-- name: beat
-- Those that do not come back were cancelled or deleted.
update comp_ai.responses
set heartbeat_at = now()
where id = any($1::text[]) and status in ('queued', 'in_progress')
returning id;

-- name: sweep
delete from comp_ai.responses
where id in (
    select id from comp_ai.responses r
    where expires_at <= now()
      and not exists (
          select from comp_ai.legal_holds h
          where h.subject = r.principal_id and h.released_at is null)
    order by expires_at
    limit $1
    for update skip locked
);
