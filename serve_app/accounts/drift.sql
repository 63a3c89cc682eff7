-- Named queries of the drift between the log and the engines; see drift.py.

-- name: note
insert into comp_ai.engine_counts
    (replica_id, at, model, started_at, prompt_tokens, completion_tokens, requests_running)
values ($1, $2, $3, $4, $5, $6, $7)
on conflict do nothing;

-- name: forget
delete from comp_ai.engine_counts where at < now() - $1::interval;

-- name: drift
-- $1 the stretch that is looked at, $2 and $3 how old a reading must be: of an idle engine, of
-- any; $4 how long before the stretch one of its requests may have begun.
with readings as (
    select *, started_at > now() - $1::interval as from_start
    from comp_ai.engine_counts
    where at > now() - $1::interval
),
lasts as (
    select distinct on (replica_id) *
    from readings
    where at <= now() - case when requests_running = 0 then $2::interval else $3::interval end
    order by replica_id, at desc
),
firsts as (
    select distinct on (replica_id) *
    from readings
    order by replica_id, at
),
spans as (
    select l.replica_id, l.model, l.from_start, l.at as until,
           case when l.from_start then l.started_at else f.at end as since,
           l.prompt_tokens + l.completion_tokens
               - case when l.from_start then 0 else f.prompt_tokens + f.completion_tokens end
               as engine_tokens
    from lasts l
    join firsts f using (replica_id)
),
logged as (
    select s.model, s.engine_tokens, r.*
    from spans s
    cross join lateral (
        select coalesce(sum(tokens) filter (
                   where ended_at <= s.until and (s.from_start or created_at >= s.since)
               ), 0) as ended,
               coalesce(sum(tokens), 0) as touched
        from (
            select created_at, prompt_tokens + completion_tokens as tokens,
                   created_at + make_interval(secs => duration_ms / 1000) as ended_at
            from comp_ai.requests
            where replica_id = s.replica_id
              and created_at > s.since - $4::interval
              and created_at < s.until
        ) as near
        where ended_at > s.since
    ) as r
)
select model,
       count(*)::int                as replicas,
       sum(engine_tokens)::bigint   as engine_tokens,
       sum(ended)::bigint           as log_tokens,
       sum(touched - ended)::bigint as open_tokens
from logged
group by model
order by model;
