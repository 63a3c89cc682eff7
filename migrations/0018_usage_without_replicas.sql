-- Usage is appended without the replica: nothing reads it, and fewer rows are to be folded.
--
-- The drift between the log and the engines needs the requests of a stretch of time, which sums by
-- replica do not tell apart. The release before this one folds what it finds, and finds no replica.
-- Its statements name the column and the table, so both stay until it is gone.

create or replace function comp_ai.append_usage() returns trigger
language plpgsql as $$
begin
    insert into comp_ai.usage_pending (
        bucket, principal_id, model, api_key_id, completed, requests, prompt_tokens,
        completion_tokens, cost_micros, duration_ms, first_tokens, time_to_first_token_ms)
    select date_trunc('minute', created_at, 'UTC'), coalesce(principal_id, ''),
           coalesce(model, ''), coalesce(api_key_id, '00000000-0000-0000-0000-000000000000'),
           outcome = 'completed', count(*), sum(prompt_tokens),
           sum(completion_tokens), sum(cost_micros), sum(duration_ms),
           count(time_to_first_token_ms), coalesce(sum(time_to_first_token_ms), 0)
    from inserted
    group by 1, 2, 3, 4, 5;
    return null;
end
$$;

comment on column comp_ai.usage_pending.replica_id is 'not filled any more; dropped later';
comment on table comp_ai.replica_usage is 'not filled any more; dropped later';
