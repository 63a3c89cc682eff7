-- Named queries of the limits; loaded by serve_app/limits/usage_store.py.

-- name: other_totals
-- What this journal does not know: written by another one, or by a migration.
select account, period, tokens, cost_micros
from comp_ai.limit_usage
where period = any($1::text[]) and journal is distinct from $2;

-- name: keep_totals
-- In one order, so that two writers, of which one is about to end, cannot block each other.
insert into comp_ai.limit_usage (account, period, tokens, cost_micros, journal)
select account, period, tokens, cost_micros, $5
from unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[])
    as changed (account, period, tokens, cost_micros)
order by account, period
on conflict (account, period) do update set
    tokens = excluded.tokens, cost_micros = excluded.cost_micros,
    journal = excluded.journal, updated_at = now();

-- name: forget_days
-- A month is named with seven characters, a day with ten.
delete from comp_ai.limit_usage where length(period) = 10 and period < $1;
