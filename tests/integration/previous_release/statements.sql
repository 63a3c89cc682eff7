-- What the release before this schema says to PostgreSQL, every statement of it, as it was at
-- commit 785c24e (migrations to 0008). It runs beside the new schema during an update. Once a
-- release is made, put its statements here instead.

-- name: accounts_stage_requests
create temporary table if not exists staged_requests on commit delete rows
as select id, request_id, created_at, route, status, outcome, error_code, principal_id,
    principal_kind, api_key_id, client_address, model, stream, finish_reason, prompt_tokens,
    completion_tokens, auth_ms, limits_ms, queue_ms, time_to_first_token_ms,
    inter_token_mean_ms, duration_ms, replica_id, denied from comp_ai.requests with no data;

-- name: accounts_stage_bodies
create temporary table if not exists staged_bodies on commit delete rows
as select id, created_at, request_body, response_text from comp_ai.request_bodies with no data;

-- name: accounts_insert_requests
with inserted as (
    insert into comp_ai.requests (id, request_id, created_at, route, status, outcome,
        error_code, principal_id, principal_kind, api_key_id, client_address, model, stream,
        finish_reason, prompt_tokens, completion_tokens, auth_ms, limits_ms, queue_ms,
        time_to_first_token_ms, inter_token_mean_ms, duration_ms, replica_id, denied)
    select id, request_id, created_at, route, status, outcome, error_code, principal_id,
        principal_kind, api_key_id, client_address, model, stream, finish_reason, prompt_tokens,
        completion_tokens, auth_ms, limits_ms, queue_ms, time_to_first_token_ms,
        inter_token_mean_ms, duration_ms, replica_id, denied from staged_requests
    on conflict do nothing
    returning id, denied
)
select count(*) as written, array_agg(id) filter (where denied is not null) as refused
from inserted;

-- name: accounts_insert_bodies
insert into comp_ai.request_bodies (id, created_at, request_body, response_text)
select id, created_at, request_body, response_text from staged_bodies
on conflict do nothing;

-- name: accounts_ensure_partitions
select comp_ai.ensure_request_partitions((now() at time zone 'UTC')::date, 3);

-- name: stored_idempotency_claim
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
    created_at = now(),
    expires_at = excluded.expires_at
where held.expires_at <= now() or (held.state = 'claimed' and held.claim_expires_at <= now())
returning true;

-- name: stored_idempotency_look
select route, fingerprint, state, status, media_type, answer,
       extract(epoch from now() - created_at)::double precision as age_s
from comp_ai.idempotency_keys
where principal_id = $1 and key = $2;

-- name: stored_idempotency_renew
update comp_ai.idempotency_keys
set claim_expires_at = now() + make_interval(secs => $4)
where principal_id = $1 and key = $2 and owner = $3 and state = 'claimed'
returning true;

-- name: stored_idempotency_answered
update comp_ai.idempotency_keys
set state = $4, status = $5, media_type = $6, answer = $7,
    expires_at = now() + make_interval(secs => $8)
where principal_id = $1 and key = $2 and owner = $3 and state = 'claimed'
returning true;

-- name: stored_idempotency_release
delete from comp_ai.idempotency_keys
where principal_id = $1 and key = $2 and owner = $3 and state = 'claimed';

-- name: stored_idempotency_sweep
with expired as (
    select principal_id, key from comp_ai.idempotency_keys
    where expires_at <= now()
    order by expires_at
    limit $1
    for update skip locked
)
delete from comp_ai.idempotency_keys as held using expired
where held.principal_id = expired.principal_id and held.key = expired.key;

-- name: stored_responses_insert_response
insert into comp_ai.responses
    (id, principal_id, model, status, background, previous_id, response, input_items,
     expires_at, heartbeat_at)
values ($1, $2, $3, $4, $5, $6, $7, $8, now() + make_interval(secs => $9),
        case when $5 then now() end);

-- name: stored_responses_prolong
update comp_ai.responses
set expires_at = greatest(expires_at, now() + make_interval(secs => $2))
where id = any($1::text[]);

-- name: stored_responses_find_response
select id, model, status, background, previous_id, response, input_items,
       background and status in ('queued', 'in_progress')
           and heartbeat_at < now() - make_interval(secs => $3) as abandoned
from comp_ai.responses
where id = $1 and principal_id = $2 and expires_at > now();

-- name: stored_responses_chain
with recursive chain as (
    select r.id, r.status, r.previous_id, r.response, r.input_items, 1 as depth,
           octet_length(r.response) + octet_length(r.input_items)::bigint as bytes
    from comp_ai.responses r
    where r.id = $1 and r.principal_id = $2 and r.expires_at > now()
    union all
    select r.id, r.status, r.previous_id, r.response, r.input_items, c.depth + 1,
           c.bytes + octet_length(r.response) + octet_length(r.input_items)
    from comp_ai.responses r
    join chain c on r.id = c.previous_id
    where r.principal_id = $2 and r.expires_at > now() and c.depth <= $3 and c.bytes <= $4
)
select id, status, previous_id, response, input_items, depth, bytes
from chain
order by depth desc;

-- name: stored_responses_delete_response
delete from comp_ai.responses
where id = $1 and principal_id = $2 and expires_at > now()
returning id;

-- name: stored_responses_lock_background
select response, status, background,
       background and status in ('queued', 'in_progress')
           and heartbeat_at < now() - make_interval(secs => $3) as abandoned
from comp_ai.responses
where id = $1 and principal_id = $2 and expires_at > now()
for update;

-- name: stored_responses_advance
update comp_ai.responses
set status = $2, response = $3, updated_at = now(), heartbeat_at = now()
where id = $1 and status in ('queued', 'in_progress')
returning id;

-- name: stored_responses_beat
update comp_ai.responses
set heartbeat_at = now()
where id = any($1::text[]) and status in ('queued', 'in_progress')
returning id;

-- name: stored_responses_sweep
delete from comp_ai.responses
where id in (
    select id from comp_ai.responses
    where expires_at <= now()
    order by expires_at
    limit $1
    for update skip locked
);

-- name: batches_lock_owner
select pg_advisory_xact_lock(hashtextextended('comp_ai.files of ' || $1, 0));

-- name: batches_add_file
insert into comp_ai.files (id, owner, purpose, filename, bytes, status, expires_at)
select $1, $2::text, $3, $4, $5::bigint, 'uploading', now() + make_interval(secs => $6)
where $5::bigint + coalesce(
    (select sum(bytes) from comp_ai.files where owner = $2::text and expires_at > now()), 0) <= $7
returning *;

-- name: batches_add_result_file
insert into comp_ai.files (id, owner, purpose, filename, bytes, status, expires_at)
values ($1, $2, 'batch_output', $3, 0, 'processed', now() + make_interval(secs => $4));

-- name: batches_measure_file
update comp_ai.files set bytes = $2 where id = $1;

-- name: batches_add_chunk
insert into comp_ai.file_chunks (file_id, number, content) values ($1, $2, $3);

-- name: batches_publish_file
update comp_ai.files set status = 'processed' where id = $1 returning *;

-- name: batches_discard_file
delete from comp_ai.files where id = $1 and status = 'uploading';

-- name: batches_find_file
select * from comp_ai.files
where id = $1 and owner = $2 and status = 'processed' and expires_at > now();

-- name: batches_delete_file
delete from comp_ai.files
where id = $1 and owner = $2 and status = 'processed' and expires_at > now() returning id;

-- name: batches_list_files_asc
select * from comp_ai.files
where owner = $1 and status = 'processed' and expires_at > now()
  and ($2::text is null or purpose = $2) and ($3::text is null or id > $3)
order by id limit $4;

-- name: batches_list_files_desc
select * from comp_ai.files
where owner = $1 and status = 'processed' and expires_at > now()
  and ($2::text is null or purpose = $2) and ($3::text is null or id < $3)
order by id desc limit $4;

-- name: batches_read_chunk
select content from comp_ai.file_chunks where file_id = $1 and number = $2;

-- name: batches_sweep_chunks
delete from comp_ai.file_chunks where (file_id, number) in (
    select c.file_id, c.number
    from comp_ai.files f join comp_ai.file_chunks c on c.file_id = f.id
    where f.expires_at <= now()
       or (f.status = 'uploading' and f.created_at < now() - interval '1 hour')
    limit $1
    for update of c skip locked);

-- name: batches_sweep_files
delete from comp_ai.files where id in (
    select id from comp_ai.files f
    where (f.expires_at <= now()
           or (f.status = 'uploading' and f.created_at < now() - interval '1 hour'))
      and not exists (select 1 from comp_ai.file_chunks c where c.file_id = f.id)
    limit $1
    for update skip locked);

-- name: batches_sweep_batches
delete from comp_ai.batches where id in (
    select id from comp_ai.batches
    where keep_until <= now()
      and status not in ('validating', 'in_progress', 'finalizing', 'cancelling')
    limit $1
    for update skip locked);

-- name: batches_add_batch
insert into comp_ai.batches
    (id, owner, principal, api_key_id, endpoint, completion_window, input_file_id,
     output_expires_after_s, status, metadata, expires_at, keep_until)
select $1, $2::text, $3, $4, $5, $6, $7, $8, 'validating', $9,
       now() + make_interval(secs => $10), now() + make_interval(secs => $11)
where $12 > (
    select count(*) from comp_ai.batches
    where owner = $2::text
      and status in ('validating', 'in_progress', 'finalizing', 'cancelling'))
returning *;

-- name: batches_find_batch
select * from comp_ai.batches where id = $1 and owner = $2;

-- name: batches_list_batches
select * from comp_ai.batches
where owner = $1 and ($2::text is null or id < $2)
order by id desc limit $3;

-- name: batches_cancel_batch
update comp_ai.batches set status = 'cancelling', cancelling_at = now()
where id = $1 and owner = $2 and status in ('validating', 'in_progress')
returning *;

-- name: batches_count_lines
select batch_id,
       count(*) filter (where state = 'completed') as completed,
       count(*) filter (where state in ('failed', 'cancelled', 'expired')) as failed
from comp_ai.batch_lines where batch_id = any($1::text[]) group by batch_id;

-- name: batches_open_batches
select id, owner, principal, endpoint, status, input_file_id, output_expires_after_s,
       expires_at <= now() as overdue,
       not exists (select 1 from comp_ai.batch_lines l
                   where l.batch_id = b.id and l.ready_at is not null) as settled
from comp_ai.batches b
where status in ('validating', 'in_progress', 'finalizing', 'cancelling')
order by id limit 1000;

-- name: batches_lock_batch
select pg_try_advisory_xact_lock(hashtextextended('comp_ai.batches ' || $1, 0));

-- name: batches_batch_status
select status from comp_ai.batches where id = $1;

-- name: batches_add_lines
insert into comp_ai.batch_lines (batch_id, number, custom_id, body)
select $1, number, custom_id, body
from unnest($2::integer[], $3::text[], $4::bytea[]) as line (number, custom_id, body);

-- name: batches_drop_lines
delete from comp_ai.batch_lines where batch_id = $1;

-- name: batches_begin_batch
update comp_ai.batches
set status = 'in_progress', in_progress_at = now(), total = $2, model = $3
where id = $1 and status = 'validating' returning id;

-- name: batches_fail_batch
update comp_ai.batches set status = 'failed', failed_at = now(), errors = $2
where id = $1 and status = 'validating' returning id;

-- name: batches_claim_line
with next as (
    select l.batch_id, l.number
    from comp_ai.batch_lines l
    where l.batch_id = $1 and l.ready_at <= now()
      and exists (select 1 from comp_ai.batches b
                  where b.id = $1 and b.status = 'in_progress' and b.expires_at > now())
    order by l.ready_at, l.number
    limit 1
    for update of l skip locked
)
update comp_ai.batch_lines l
set state = 'running', claim = gen_random_uuid(), ready_at = now() + make_interval(secs => $2)
from next
where l.batch_id = next.batch_id and l.number = next.number
returning l.number, l.custom_id, l.body, l.claim, l.attempts, l.waits,
    exists (
        select 1 from comp_ai.batches b
        where b.id = l.batch_id and b.api_key_id is not null and not exists (
            select 1 from comp_ai.api_keys k
            where k.id = b.api_key_id and k.revoked_at is null
              and (k.expires_at is null or k.expires_at > now()))
    ) as revoked;

-- name: batches_renew_claims
update comp_ai.batch_lines l
set ready_at = now() + make_interval(secs => $4)
from unnest($1::text[], $2::integer[], $3::uuid[]) as held (batch_id, number, claim)
join comp_ai.batches b on b.id = held.batch_id
where l.batch_id = held.batch_id and l.number = held.number and l.claim = held.claim
  and b.status = 'in_progress' and b.expires_at > now()
returning l.claim;

-- name: batches_finish_line
update comp_ai.batch_lines
set state = $4, status_code = $5, request_id = $6, response = $7, error_code = $8,
    error_message = $9, ready_at = null, claim = null, body = null
where batch_id = $1 and number = $2 and claim = $3
returning number;

-- name: batches_postpone_line
update comp_ai.batch_lines
set state = 'pending', claim = null, attempts = $4, waits = $5,
    ready_at = now() + make_interval(secs => $6)
where batch_id = $1 and number = $2 and claim = $3
returning number;

-- name: batches_expire_batch
update comp_ai.batches set status = 'finalizing', finalizing_at = now(), expired_at = now()
where id = $1 and status in ('validating', 'in_progress') and expires_at <= now();

-- name: batches_begin_finalizing
update comp_ai.batches set status = 'finalizing', finalizing_at = now()
where id = $1 and status = 'in_progress';

-- name: batches_close_lines
with open as (
    select batch_id, number from comp_ai.batch_lines
    where batch_id = $1 and ready_at is not null and (state = 'pending' or ready_at <= now())
    for update skip locked
)
update comp_ai.batch_lines l
set state = $2, error_code = $3, error_message = $4, ready_at = null, claim = null, body = null
from open where l.batch_id = open.batch_id and l.number = open.number;

-- name: batches_lines_are_open
select exists (
    select 1 from comp_ai.batch_lines where batch_id = $1 and ready_at is not null);

-- name: batches_results
select number, custom_id, state, status_code, request_id, response, error_code, error_message
from comp_ai.batch_lines where batch_id = $1 order by number;

-- name: batches_end_batch
update comp_ai.batches
set output_file_id = $3, error_file_id = $4, completed = $5, failed = $6,
    status = case when status = 'cancelling' then 'cancelled'
                  when expired_at is not null then 'expired'
                  else 'completed' end,
    cancelled_at = case when status = 'cancelling' then now() end,
    completed_at = case when status = 'finalizing' and expired_at is null then now() end
where id = $1 and status = $2
returning id;

-- name: limits_other_totals
select account, period, tokens, cost_micros
from comp_ai.limit_usage
where period = any($1::text[]) and journal is distinct from $2;

-- name: limits_keep_totals
insert into comp_ai.limit_usage (account, period, tokens, cost_micros, journal)
select account, period, tokens, cost_micros, $5
from unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[])
    as changed (account, period, tokens, cost_micros)
order by account, period
on conflict (account, period) do update set
    tokens = excluded.tokens, cost_micros = excluded.cost_micros,
    journal = excluded.journal, updated_at = now();

-- name: limits_forget_days
delete from comp_ai.limit_usage where length(period) = 10 and period < $1;

-- name: identity_lock_owner
select pg_advisory_xact_lock(hashtextextended('comp_ai.api_keys of ' || $1, 0));

-- name: identity_count_valid
select count(*) from comp_ai.api_keys
where owner = $1 and replaced_by is null and revoked_at is null
  and (expires_at is null or expires_at > now());

-- name: identity_add
insert into comp_ai.api_keys
    (id, prefix, secret_hash, name, note, owner, permissions, models, limits,
     created_at, created_by, expires_at)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9::jsonb, $10, $11, $12)
returning *;

-- name: identity_find
select * from comp_ai.api_keys where prefix = any($1::text[]);

-- name: identity_get
select * from comp_ai.api_keys
where id = $1 and replaced_by is null and ($2::text is null or owner = $2);

-- name: identity_lock
select * from comp_ai.api_keys
where id = $1 and replaced_by is null and ($2::text is null or owner = $2)
for update;

-- name: identity_list_desc
select * from comp_ai.api_keys
where replaced_by is null and ($1::text is null or owner = $1) and ($2::uuid is null or id < $2)
order by id desc limit $3;

-- name: identity_list_asc
select * from comp_ai.api_keys
where replaced_by is null and ($1::text is null or owner = $1) and ($2::uuid is null or id > $2)
order by id limit $3;

-- name: identity_earlier_secrets
select * from comp_ai.api_keys
where replaced_by = any($1::uuid[]) and revoked_at is null and expires_at > now()
order by expires_at desc, id desc;

-- name: identity_change
update comp_ai.api_keys
set name = $2, note = $3, permissions = $4, models = $5, limits = $6::jsonb, expires_at = $7
where id = $1
returning *;

-- name: identity_change_earlier
update comp_ai.api_keys
set permissions = $2, models = $3, limits = $4::jsonb, expires_at = least(expires_at, $5)
where replaced_by = $1;

-- name: identity_end_earlier
update comp_ai.api_keys set expires_at = least(expires_at, $2) where replaced_by = $1;

-- name: identity_drop_ended
delete from comp_ai.api_keys where replaced_by = $1 and expires_at <= $2;

-- name: identity_renew
update comp_ai.api_keys set prefix = $2, secret_hash = $3, rotated_at = $4 where id = $1
returning *;

-- name: identity_keep_earlier
insert into comp_ai.api_keys
    (id, prefix, secret_hash, name, owner, permissions, models, limits,
     created_at, created_by, expires_at, last_used_at, replaced_by)
select $1, $2, $3, name, owner, permissions, models, limits,
       created_at, created_by, least(expires_at, $4), $5, id
from comp_ai.api_keys where id = $6;

-- name: identity_revoke
update comp_ai.api_keys set revoked_at = coalesce(revoked_at, $2)
where id = $1 or replaced_by = $1;

-- name: identity_mark_used
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

-- name: audit_lock_head
select seq, hash from comp_ai.audit_head for update;

-- name: audit_append
insert into comp_ai.audit_log (seq, at, recorded_at, actor_id, actor_kind, api_key_id, action,
    target, before, after, client_address, request_id, previous_hash, hash) values ($1, $2, $3,
    $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14);

-- name: audit_move_head
update comp_ai.audit_head set seq = $1, hash = $2;

-- name: audit_head
select seq, hash from comp_ai.audit_head;

-- name: audit_all_rows
select seq, at, recorded_at, actor_id, actor_kind, api_key_id, action, target, before, after,
    client_address, request_id, previous_hash, hash from comp_ai.audit_log order by seq;

-- name: audit_page
select seq, at, recorded_at, actor_id, actor_kind, api_key_id, action, target, before, after,
    client_address, request_id, previous_hash, hash from comp_ai.audit_log
where ($1::text is null or actor_id = $1)
  and ($2::text is null or action = $2)
  and ($3::timestamptz is null or at >= $3)
  and ($4::timestamptz is null or at < $4)
  and ($5::bigint is null or seq < $5)
order by seq desc
limit $6;

-- name: audit_last_after
select after from comp_ai.audit_log where action = $1 order by seq desc limit 1;
