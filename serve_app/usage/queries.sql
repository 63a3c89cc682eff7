-- Named queries of usage; loaded by serve_app/usage/reading.py. In braces: names of our own tables
-- and columns, and conditions with the numbers of their values.

-- name: page
-- Folded and pending together, in one snapshot: a pending row is in one of the two.
select {groups}
       sum(requests)::bigint as requests,
       coalesce(sum(requests) filter (where completed), 0)::bigint as completed_requests,
       sum(prompt_tokens)::bigint as prompt_tokens,
       sum(completion_tokens)::bigint as completion_tokens,
       sum(cost_micros)::bigint as cost_micros,
       sum(duration_ms) / nullif(sum(requests), 0) as mean_duration_ms,
       sum(time_to_first_token_ms) / nullif(sum(first_tokens), 0) as mean_time_to_first_token_ms
from (
    select {folded} completed, requests, prompt_tokens, completion_tokens, cost_micros,
           duration_ms, first_tokens, time_to_first_token_ms
    from comp_ai.{table}
    where {wanted}
    union all
    select {pending} completed, requests, prompt_tokens, completion_tokens, cost_micros,
           duration_ms, first_tokens, time_to_first_token_ms
    from comp_ai.usage_pending
    where {wanted}
) as used
where {beyond}
group by {grouping}
order by {order}
limit {limit};
