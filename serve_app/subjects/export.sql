-- Named queries of an export; loaded by serve_app/subjects/exporting.py. $1 is the subject, $2 its
-- name in the accounts of the limits. The name of a query is the kind of its lines.

-- name: api_key
-- Not the hash of the secret.
select id, prefix, name, note, permissions, models, limits, bodies, created_at, created_by,
       expires_at, revoked_at, last_used_at, rotated_at, replaced_by
from comp_ai.api_keys where owner = $1 and $2::text is not null order by id;

-- name: request
select * from comp_ai.requests
where principal_id = $1 and $2::text is not null order by created_at, id;

-- name: response
select * from comp_ai.responses
where principal_id = $1 and $2::text is not null order by created_at, id;

-- name: idempotency_answer
select key, route, state, status, media_type, answer, key_id, sealed, created_at, expires_at
from comp_ai.idempotency_keys where principal_id = $1 and $2::text is not null order by key;

-- name: file
select * from comp_ai.files where owner = $1 and $2::text is not null order by id;

-- name: file_chunk
select c.file_id, c.number, c.content, c.key_id, c.sealed
from comp_ai.files f join comp_ai.file_chunks c on c.file_id = f.id
where f.owner = $1 and $2::text is not null order by c.file_id, c.number;

-- name: batch
select * from comp_ai.batches where owner = $1 and $2::text is not null order by id;

-- name: batch_line
select l.batch_id, l.number, l.custom_id, l.body, l.state, l.status_code, l.request_id,
       l.response, l.error_code, l.error_message, l.key_id, l.sealed
from comp_ai.batches b join comp_ai.batch_lines l on l.batch_id = b.id
where b.owner = $1 and $2::text is not null order by l.batch_id, l.number;

-- name: usage_pending
select bucket, model, api_key_id, completed, requests, prompt_tokens, completion_tokens, cost_micros
from comp_ai.usage_pending where principal_id = $1 and $2::text is not null order by bucket;

-- name: usage_minute
select bucket, model, api_key_id, completed, requests, prompt_tokens, completion_tokens, cost_micros
from comp_ai.usage_minute where principal_id = $1 and $2::text is not null order by bucket;

-- name: usage_hour
select bucket, model, api_key_id, completed, requests, prompt_tokens, completion_tokens, cost_micros
from comp_ai.usage_hour where principal_id = $1 and $2::text is not null order by bucket;

-- name: usage_day
select bucket, model, api_key_id, completed, requests, prompt_tokens, completion_tokens, cost_micros
from comp_ai.usage_day where principal_id = $1 and $2::text is not null order by bucket;

-- name: limit_usage
select account, period, tokens, cost_micros, updated_at
from comp_ai.limit_usage
where $1::text is not null
  and (account = 'principal:' || $2
       or (account ~ '^(group|role)-member:' and split_part(account, ':', 3) = $2))
order by account, period;

-- name: audit
select seq, at, actor_kind, api_key_id, action, target, before, after, client_address, request_id
from comp_ai.audit_log where actor_id = $1 and $2::text is not null order by seq;

-- name: bodies
-- Of the requests $1, made from $2 to $3: the times keep it to few partitions.
select id, request_body, response_text, key_id, sealed
from comp_ai.request_bodies
where id = any($1::uuid[]) and created_at between $2 and $3;
