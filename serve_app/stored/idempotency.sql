-- Named queries of the idempotency keys. Times are PostgreSQL's: the gateways' clocks differ.

-- name: claim
-- Take the key if nobody holds it: it is new, it is past its time, or whoever claimed it died.
-- Of several at once one gets a row back; the others wait here for its commit, and get none.
insert into comp_ai.idempotency_keys as held
    (principal_id, key, route, fingerprint, state, owner, claim_expires_at, expires_at)
values ($1, $2, $3, $4, 'claimed', $5,
        now() + make_interval(secs => $6), now() + make_interval(secs => $7))
on conflict (principal_id, key) do update set
    route = excluded.route,
    fingerprint = excluded.fingerprint,
    state = excluded.state,
    owner = excluded.owner,
    claim_expires_at = excluded.claim_expires_at,
    status = null,
    media_type = null,
    answer = null,
    key_id = null,
    sealed = null,
    created_at = now(),
    expires_at = excluded.expires_at
where held.expires_at <= now() or (held.state = 'claimed' and held.claim_expires_at <= now())
returning true;

-- name: look
select route, fingerprint, state, status, media_type, answer, key_id, sealed,
       extract(epoch from now() - created_at)::double precision as age_s
from comp_ai.idempotency_keys
where principal_id = $1 and key = $2;

-- name: renew
update comp_ai.idempotency_keys
set claim_expires_at = now() + make_interval(secs => $4)
where principal_id = $1 and key = $2 and owner = $3 and state = 'claimed'
returning true;

-- name: answered
update comp_ai.idempotency_keys
set state = $4, status = $5, media_type = $6, key_id = $7, sealed = $8,
    expires_at = now() + make_interval(secs => $9)
where principal_id = $1 and key = $2 and owner = $3 and state = 'claimed'
returning true;

-- name: release
delete from comp_ai.idempotency_keys
where principal_id = $1 and key = $2 and owner = $3 and state = 'claimed';

-- name: sweep
-- Several gateways do this at once, each takes rows that no other has.
with expired as (
    select principal_id, key from comp_ai.idempotency_keys k
    where expires_at <= now()
      and not exists (
          select from comp_ai.legal_holds h
          where h.subject = k.principal_id and h.released_at is null)
    order by expires_at
    limit $1
    for update skip locked
)
delete from comp_ai.idempotency_keys as held using expired
where held.principal_id = expired.principal_id and held.key = expired.key;
