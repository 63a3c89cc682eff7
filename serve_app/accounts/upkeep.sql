-- Named queries of the upkeep; loaded by serve_app/accounts/upkeep.py.

-- name: session
-- Nobody waits long behind a lock that a task waits for; and the server itself finds out that we
-- are gone, so that the advisory lock of a dead machine does not stay.
select set_config('lock_timeout', '10s', false),
       set_config('client_connection_check_interval', '10s', false),
       set_config('tcp_keepalives_idle', '10', false),
       set_config('tcp_keepalives_interval', '5', false),
       set_config('tcp_keepalives_count', '3', false);

-- name: take_lock
select pg_try_advisory_lock($1);

-- name: limit_statements
select set_config('statement_timeout', $1, false);

-- name: ensure_partitions
-- This month and the next two, in UTC.
select comp_ai.ensure_partitions((now() at time zone 'UTC')::date, 3);

-- name: months_ahead
-- How many months after this one have their partition of every table, without a gap.
select coalesce(min(ahead) - 1, 12)
from generate_series(0, 12) as ahead
cross join comp_ai.partitioned_tables() as parent
where to_regclass(format(
    'comp_ai.%I',
    parent || to_char((now() at time zone 'UTC') + make_interval(months => ahead), '"_y"YYYY"m"MM')
)) is null;
