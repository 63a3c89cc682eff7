-- Named queries of an erasure; loaded by serve_app/subjects/erasing.py. $1 is the subject, $2 its
-- pseudonym, $3 until when; the name of a query is the table that it counts. Each is repeated until
-- it finds nothing, so each takes a batch. $4 is how many rows that is.

-- name: responses
with gone as (
    delete from comp_ai.responses where id in (
        select id from comp_ai.responses
        where principal_id = $1 and created_at <= $3 and $2::text is not null limit $4)
    returning 1)
select count(*) from gone;

-- name: idempotency_keys
with gone as (
    delete from comp_ai.idempotency_keys where (principal_id, key) in (
        select principal_id, key from comp_ai.idempotency_keys
        where principal_id = $1 and created_at <= $3 and $2::text is not null limit $4)
    returning 1)
select count(*) from gone;

-- name: batches
-- Before the files, so that no batch begins on a file that is about to go. Its lines go with it.
with gone as (
    delete from comp_ai.batches where id in (
        select id from comp_ai.batches
        where owner = $1 and created_at <= $3 and $2::text is not null
        limit greatest(1, $4::bigint / 100))
    returning 1)
select count(*) from gone;

-- name: files
-- Their content goes with them.
with gone as (
    delete from comp_ai.files where id in (
        select id from comp_ai.files
        where owner = $1 and created_at <= $3 and $2::text is not null
        limit greatest(1, $4::bigint / 100))
    returning 1)
select count(*) from gone;

-- name: api_keys
-- A name and a note are free texts, which may say whose the key is.
with changed as (
    update comp_ai.api_keys
    set owner = $2, name = null, note = null, revoked_at = coalesce(revoked_at, now()),
        created_by = case when created_by = $1 then $2 else created_by end
    where id in (select id from comp_ai.api_keys
                 where owner = $1 and created_at <= $3 order by id limit $4)
    returning 1)
select count(*) from changed;

-- name: api_keys_made_for_others
with changed as (
    update comp_ai.api_keys set created_by = $2
    where id in (select id from comp_ai.api_keys
                 where created_by = $1 and created_at <= $3 order by id limit $4)
    returning 1)
select count(*) from changed;

-- name: requests
-- With their bodies: those of the time before bodies were sealed are not unreadable by themselves.
-- The ids of a request and of its trace are the client's to choose: ours stands in the place of one,
-- nothing in that of the other.
with batch as materialized (
    select id, created_at from comp_ai.requests
    where principal_id = $1 and created_at <= $3 limit $4),
bodies as (
    delete from comp_ai.request_bodies b using batch s
    where b.id = s.id and b.created_at = s.created_at),
changed as (
    update comp_ai.requests r
    set principal_id = $2, client_address = null, request_id = r.id::text, trace_id = null
    from batch s where r.id = s.id and r.created_at = s.created_at
    returning 1)
select count(*) from changed;

-- name: usage_pending
with changed as (
    update comp_ai.usage_pending set principal_id = $2
    where id in (select id from comp_ai.usage_pending
                 where principal_id = $1 and bucket <= $3 limit $4)
    returning 1)
select count(*) from changed;

-- name: usage_by_time
-- A row of the pseudonym may be there already: of an erasure that was broken off.
with batch as materialized (
    select bucket, principal_id, model, api_key_id, completed from comp_ai.{table}
    where principal_id = $1 and bucket <= $3 limit $4),
gone as (
    delete from comp_ai.{table} u using batch s
    where (u.bucket, u.principal_id, u.model, u.api_key_id, u.completed)
        = (s.bucket, s.principal_id, s.model, s.api_key_id, s.completed)
    returning u.*),
added as (
    insert into comp_ai.{table} as kept
        (bucket, principal_id, model, api_key_id, completed, requests, prompt_tokens,
         completion_tokens, cost_micros, duration_ms, first_tokens, time_to_first_token_ms)
    select bucket, $2, model, api_key_id, completed, requests, prompt_tokens,
           completion_tokens, cost_micros, duration_ms, first_tokens, time_to_first_token_ms
    from gone
    on conflict (bucket, principal_id, model, api_key_id, completed) do update set
        requests = kept.requests + excluded.requests,
        prompt_tokens = kept.prompt_tokens + excluded.prompt_tokens,
        completion_tokens = kept.completion_tokens + excluded.completion_tokens,
        cost_micros = kept.cost_micros + excluded.cost_micros,
        duration_ms = kept.duration_ms + excluded.duration_ms,
        first_tokens = kept.first_tokens + excluded.first_tokens,
        time_to_first_token_ms = kept.time_to_first_token_ms + excluded.time_to_first_token_ms)
select count(*) from gone;

-- name: limit_usage
-- $1 is the subject as the accounts write it. They have no time, only a month or a day.
with gone as (
    delete from comp_ai.limit_usage where (account, period) in (
        select account, period from comp_ai.limit_usage
        where (account = 'principal:' || $1
               or (account ~ '^(group|role)-member:' and split_part(account, ':', 3) = $1))
          and $3::timestamptz is not null
        limit $4)
    returning *),
added as (
    insert into comp_ai.limit_usage as kept (account, period, tokens, cost_micros, journal)
    select regexp_replace(account, '[^:]*$', $2), period, tokens, cost_micros, journal from gone
    on conflict (account, period) do update set
        tokens = kept.tokens + excluded.tokens,
        cost_micros = kept.cost_micros + excluded.cost_micros)
select count(*) from gone;

-- name: legal_holds
-- Those that were released; one in force refuses the erasure. A reason may name people.
with changed as (
    update comp_ai.legal_holds
    set subject = case when subject = $1 then $2 else subject end,
        reason = case when subject = $1 then '' else reason end,
        set_by = case when set_by = $1 then $2 else set_by end,
        released_by = case when released_by = $1 then $2 else released_by end
    where id in (select id from comp_ai.legal_holds
                 where $1 in (subject, set_by, released_by) and set_at <= $3 limit $4)
    returning 1)
select count(*) from changed;

-- name: counts
-- What there is of $1; $2 is its name in the accounts of the limits.
select 'requests' as place, count(*) as rows from comp_ai.requests where principal_id = $1
union all
select 'request_bodies', count(*) from comp_ai.requests r
join comp_ai.request_bodies b on b.id = r.id and b.created_at = r.created_at
where r.principal_id = $1
union all
select 'subject_keys', count(*) from comp_ai_keys.subject_keys where kind = 'subject' and subject = $1
union all
select 'responses', count(*) from comp_ai.responses where principal_id = $1
union all
select 'idempotency_keys', count(*) from comp_ai.idempotency_keys where principal_id = $1
union all
select 'files', count(*) from comp_ai.files where owner = $1
union all
select 'batches', count(*) from comp_ai.batches where owner = $1
union all
select 'api_keys', count(*) from comp_ai.api_keys where $1 in (owner, created_by)
union all
select 'usage_pending', count(*) from comp_ai.usage_pending where principal_id = $1
union all
select 'usage_minute', count(*) from comp_ai.usage_minute where principal_id = $1
union all
select 'usage_hour', count(*) from comp_ai.usage_hour where principal_id = $1
union all
select 'usage_day', count(*) from comp_ai.usage_day where principal_id = $1
union all
select 'limit_usage', count(*) from comp_ai.limit_usage
where account = 'principal:' || $2
   or (account ~ '^(group|role)-member:' and split_part(account, ':', 3) = $2)
union all
select 'legal_holds', count(*) from comp_ai.legal_holds where $1 in (subject, set_by, released_by)
union all
select 'audit_log', count(*) from comp_ai.audit_log
where $1 in (actor_id, target)
   or position(to_json($1::text)::text in concat(before, ' ', after)) > 0;
