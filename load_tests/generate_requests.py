"""Fill a database with requests as a company makes them, by set-based SQL.

    python -m load_tests.generate_requests --rows 5000000

Without --rows 5 million. They are of `--people` over `--months` until now: few people ask much
and many little, few models are asked much, and more is asked lately. The usage tables are filled
from the requests, and indexes are made at the end, which is quicker than row by row. The database
is that of the POSTGRES_ settings; it must be migrated and empty.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import asyncpg

from serve_app.database import connect
from serve_app.settings import load_settings

PEOPLE, MODELS, MONTHS = 1000, 10, 6
_CHUNK_ROWS = 500_000

_MAKE_ROOM = """
select comp_ai.ensure_partitions(
    (date_trunc('month', now() at time zone 'UTC') - make_interval(months => $1))::date, $1 + 1)
"""
# random() ^ k is skewed towards 0: the first people and models are asked most.
_INSERT = """
insert into comp_ai.requests (
    id, created_at, request_id, route, status, outcome, error_code, principal_id, principal_kind,
    api_key_id, client_address, model, stream, finish_reason, prompt_tokens, completion_tokens,
    cost_micros, auth_ms, limits_ms, queue_ms, time_to_first_token_ms, inter_token_mean_ms,
    duration_ms, replica_id)
select gen_random_uuid(), at, 'req-' || ($1::bigint + n), 'chat.completions',
       case when fate < 0.94 then 200 when fate < 0.97 then 429
            when fate < 0.99 then 502 else 499 end,
       case when fate < 0.94 then 'completed' when fate < 0.97 then 'refused'
            when fate < 0.99 then 'failed' else 'cancelled' end,
       case when fate < 0.94 then null when fate < 0.97 then 'rate_limit_exceeded'
            when fate < 0.99 then 'engine_error' else 'client_disconnected' end,
       'person-' || person, case when person % 4 = 0 then 'api_key' else 'user' end,
       case when person % 4 = 0
            then ('00000000-0000-4000-8000-' || lpad(to_hex(person * 4 + n % 3), 12, '0'))::uuid
       end,
       '10.0.' || person / 250 || '.' || person % 250, 'model-' || model, n % 2 = 0, 'stop',
       (20 + random() * 2000)::int, (random() * 500)::int, (random() * 5000)::bigint,
       random(), random(), random() * 50, 50 + random() * 500, 10 + random() * 20,
       100 + random() * 9000, 'replica-' || model || '-' || n % 3
from (
    select n, random() as fate, (random() ^ 3 * $4)::int as person,
           (random() ^ 2 * ($5 - 0.001))::int % $5 as model,
           -- More of them lately, as a service is taken up.
           now() - random() ^ 1.3 * $3::interval as at
    from generate_series(1, $2::int) as n
) as drawn
"""


_TABLES = ("requests", "usage_minute", "usage_hour", "usage_day")
# Of partitioned tables; those of their partitions come and go with them.
_INDEXES = """
select c.conname as constraint, i.relname as index,
       coalesce(pg_get_constraintdef(c.oid), pg_get_indexdef(x.indexrelid)) as definition
from pg_index x
join pg_class i on i.oid = x.indexrelid
left join pg_constraint c on c.conindid = x.indexrelid and c.conrelid = x.indrelid
where x.indrelid = $1::text::regclass
"""
_SUMS = """
    sum(requests), sum(prompt_tokens), sum(completion_tokens), sum(cost_micros), sum(duration_ms),
    sum(first_tokens), sum(time_to_first_token_ms)
"""
_MINUTES = """
insert into comp_ai.usage_minute
select date_trunc('minute', created_at, 'UTC'), principal_id, model,
       coalesce(api_key_id, '00000000-0000-0000-0000-000000000000'), outcome = 'completed',
       count(*), sum(prompt_tokens), sum(completion_tokens), sum(cost_micros), sum(duration_ms),
       count(time_to_first_token_ms), coalesce(sum(time_to_first_token_ms), 0)
from comp_ai.requests
group by 1, 2, 3, 4, 5
"""
_LONGER = """
insert into comp_ai.{table}
select date_trunc('{unit}', bucket, 'UTC'), {by}, {sums}
from comp_ai.{of}
group by date_trunc('{unit}', bucket, 'UTC'), {by}
"""
_CALLER, _MODEL = "principal_id, model, api_key_id, completed", "model, completed"
# Each from the smallest table that has what it adds up.
_LEVELS = (
    ("usage_hour", "hour", _CALLER, "usage_minute"),
    ("usage_day", "day", _CALLER, "usage_hour"),
    ("usage_hour_by_model", "hour", _MODEL, "usage_hour"),
    ("usage_day_by_model", "day", _MODEL, "usage_hour_by_model"),
)
# Sorts and groups of millions of rows in memory, and so many indexes made by two processes.
_ROOM = """
set local work_mem = '256MB';
set local maintenance_work_mem = '512MB';
"""


async def generate(
    connection: asyncpg.Connection,
    rows: int,
    *,
    people: int = PEOPLE,
    models: int = MODELS,
    months: int = MONTHS,
) -> None:
    """Fill an empty database with `rows` requests and their usage, ready to be asked.

    Raises:
        RuntimeError: it has requests already.
    """
    if await connection.fetchval("select exists (select from comp_ai.requests)"):
        raise RuntimeError("there are requests in this database already")
    await connection.execute(_MAKE_ROOM, months)
    async with connection.transaction():
        await connection.execute(_ROOM)
        # What a transaction writes into tables that it emptied needs no journal (with the
        # `wal_level` minimal).
        await connection.execute(f"truncate {', '.join(f'comp_ai.{table}' for table in _TABLES)}")
        async with _indexed_after(connection, "requests"):
            await _insert(connection, rows, people, models, months)
        await _add_up(connection)
    await _tell_the_planner(connection)


async def _insert(
    connection: asyncpg.Connection, rows: int, people: int, models: int, months: int
) -> None:
    span = timedelta(days=30 * months)
    await connection.execute("alter table comp_ai.requests disable trigger user")
    for first in range(0, rows, _CHUNK_ROWS):
        chunk = min(_CHUNK_ROWS, rows - first)
        await connection.execute(_INSERT, first, chunk, span, people - 1, models)
    await connection.execute("alter table comp_ai.requests enable trigger user")


async def _add_up(connection: asyncpg.Connection) -> None:
    async with _indexed_after(connection, "usage_minute"):
        await connection.execute(_MINUTES)
    for table, unit, by, of in _LEVELS:
        async with _indexed_after(connection, table):
            await connection.execute(
                _LONGER.format(table=table, unit=unit, by=by, of=of, sums=_SUMS)
            )


@asynccontextmanager
async def _indexed_after(connection: asyncpg.Connection, table: str) -> AsyncIterator[None]:
    """Take the indexes of `table` away, and make them again: at once, not row by row."""
    indexes = await connection.fetch(_INDEXES, f"comp_ai.{table}")
    for index in indexes:
        if index["constraint"] is None:
            await connection.execute(f"drop index comp_ai.{index['index']}")
        else:
            await connection.execute(
                f"alter table comp_ai.{table} drop constraint {index['constraint']}"
            )
    yield
    for index in indexes:
        # As it is told of a partitioned table, it would leave the partitions out.
        made = index["definition"].replace(" ON ONLY ", " ON ")
        if index["constraint"] is not None:
            made = f"alter table comp_ai.{table} add constraint {index['constraint']} {made}"
        await connection.execute(made)


async def _tell_the_planner(connection: asyncpg.Connection) -> None:
    partitioned = await connection.fetch("select * from comp_ai.partitioned_tables()")
    others = ("usage_pending", "usage_hour_by_model", "usage_day_by_model")
    for table in (*(row[0] for row in partitioned), *others):
        # A vacuum also tells which pages an index-only scan may trust.
        await connection.execute(f"vacuum (analyze) comp_ai.{table}")


async def _main(arguments: argparse.Namespace) -> None:
    connection = await connect(
        load_settings().postgres, application_name="generate-requests", statement_timeout_s=0
    )
    started_s = time.monotonic()
    await generate(connection, arguments.rows, people=arguments.people, months=arguments.months)
    await connection.close()
    print(f"{arguments.rows} requests in {time.monotonic() - started_s:.0f} s")


def main() -> None:
    """Read the arguments and fill the database."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--people", type=int, default=PEOPLE)
    parser.add_argument("--months", type=int, default=MONTHS)
    asyncio.run(_main(parser.parse_args()))


if __name__ == "__main__":
    main()
