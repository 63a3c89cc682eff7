-- Named queries of usage; loaded by serve_app/usage/reading.py. In braces: names of our own tables
-- and columns, and conditions with the numbers of their values.

-- name: page
-- Folded and pending together, in one snapshot: a pending row is in one of the two. Each is grouped
-- and limited by itself first, so that an index gives the groups in their order and no more than a
-- page of them is read. The first groups of both are among the first of each.
select {names}
       sum(requests)::bigint as requests,
       sum(completed_requests)::bigint as completed_requests,
       sum(prompt_tokens)::bigint as prompt_tokens,
       sum(completion_tokens)::bigint as completion_tokens,
       sum(cost_micros)::bigint as cost_micros,
       sum(duration_ms) / nullif(sum(requests), 0)::double precision as mean_duration_ms,
       sum(time_to_first_token_ms) / nullif(sum(first_tokens), 0)::double precision
           as mean_time_to_first_token_ms
from (
    ({folded})
    union all
    ({pending})
) as used
group by {numbers}
order by {order}
limit {limit};

-- name: groups
select {groups}
       sum(requests) as requests,
       coalesce(sum(requests) filter (where completed), 0) as completed_requests,
       sum(prompt_tokens) as prompt_tokens,
       sum(completion_tokens) as completion_tokens,
       sum(cost_micros) as cost_micros,
       sum(duration_ms) as duration_ms,
       sum(first_tokens) as first_tokens,
       sum(time_to_first_token_ms) as time_to_first_token_ms
from comp_ai.{table}
where {wanted}
group by {numbers}
order by {order}
limit {limit}
