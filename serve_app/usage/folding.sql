-- Named queries that keep the usage tables; loaded by serve_app/usage/folding.py.

-- name: fold
-- Takes at most $1 pending rows and adds them to every table, all or nothing.
with taken as (
    delete from comp_ai.usage_pending
    where id in (select id from comp_ai.usage_pending order by id limit $1 for update skip locked)
    returning *
), {levels}
select count(*) from taken;

-- name: level
{table} as (
    insert into comp_ai.{table} as kept
        ({keys}, requests, prompt_tokens, completion_tokens, cost_micros, duration_ms,
         first_tokens, time_to_first_token_ms)
    select {values}, sum(requests), sum(prompt_tokens), sum(completion_tokens),
           sum(cost_micros), sum(duration_ms), sum(first_tokens), sum(time_to_first_token_ms)
    from taken
    group by {values}
    order by {values}
    on conflict ({keys}) do update set
        requests = kept.requests + excluded.requests,
        prompt_tokens = kept.prompt_tokens + excluded.prompt_tokens,
        completion_tokens = kept.completion_tokens + excluded.completion_tokens,
        cost_micros = kept.cost_micros + excluded.cost_micros,
        duration_ms = kept.duration_ms + excluded.duration_ms,
        first_tokens = kept.first_tokens + excluded.first_tokens,
        time_to_first_token_ms = kept.time_to_first_token_ms + excluded.time_to_first_token_ms
)

-- name: take_day
-- The latest first: it is asked for soonest.
delete from comp_ai.usage_backfill
where day = (select max(day) from comp_ai.usage_backfill)
returning day;

-- name: make_room
select comp_ai.ensure_month_partition(
    name, date_trunc('month', $1::timestamptz at time zone 'UTC')::date)
from unnest(array['usage_minute', 'usage_hour', 'usage_day']) as name;

-- name: count_day
-- What the trigger of comp_ai.requests would have appended of the day that begins at $1. The
-- trigger sees the rows of one insert alone, so it says the same again; a test holds them equal.
insert into comp_ai.usage_pending (
    bucket, principal_id, model, api_key_id, completed, requests, prompt_tokens,
    completion_tokens, cost_micros, duration_ms, first_tokens, time_to_first_token_ms)
select date_trunc('minute', created_at, 'UTC'), coalesce(principal_id, ''),
       coalesce(model, ''), coalesce(api_key_id, '00000000-0000-0000-0000-000000000000'),
       outcome = 'completed', count(*), sum(prompt_tokens),
       sum(completion_tokens), sum(cost_micros), sum(duration_ms),
       count(time_to_first_token_ms), coalesce(sum(time_to_first_token_ms), 0)
from comp_ai.requests
where created_at >= $1 and created_at < $1::timestamptz + interval '1 day' and not counted
group by 1, 2, 3, 4, 5;
