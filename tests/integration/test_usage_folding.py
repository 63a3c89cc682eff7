"""The usage tables say what the requests say, whatever is repeated, late or broken off."""

from __future__ import annotations

import asyncio
import random
import re
import shutil
import uuid
from collections.abc import Iterable
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import asyncpg
import pytest

from serve_app.accounts import writer
from serve_app.accounts.metrics import NoMetrics
from serve_app.accounts.upkeep import Upkeep, UpkeepConfig
from serve_app.database import connect, migrate
from serve_app.records import Outcome, RequestRecord, new_id
from serve_app.settings import PostgresSettings
from serve_app.sql import named_queries
from serve_app.usage.folding import backfill, fold, usage_tasks
from tests.integration.conftest import MIGRATIONS
from tests.integration.links import Link
from tests.sealing import subject_keys

_NOW = datetime(2026, 11, 28, 12, 30, 30, tzinfo=UTC)
_MEASURES = """
    sum(requests)::bigint, sum(prompt_tokens)::bigint, sum(completion_tokens)::bigint,
    sum(cost_micros)::bigint, sum(duration_ms), sum(first_tokens)::bigint,
    sum(time_to_first_token_ms)
"""
_OF_REQUESTS = """
    count(*), sum(prompt_tokens), sum(completion_tokens), sum(cost_micros)::bigint,
    sum(duration_ms), count(time_to_first_token_ms), coalesce(sum(time_to_first_token_ms), 0)
"""
_CALLER = (
    "coalesce(principal_id, ''), coalesce(model, ''), "
    "coalesce(api_key_id, '00000000-0000-0000-0000-000000000000')"
)
_TABLES = {
    "usage_minute": ("minute", _CALLER, "principal_id, model, api_key_id"),
    "usage_hour": ("hour", _CALLER, "principal_id, model, api_key_id"),
    "usage_day": ("day", _CALLER, "principal_id, model, api_key_id"),
    "usage_hour_by_model": ("hour", "coalesce(model, '')", "model"),
    "usage_day_by_model": ("day", "coalesce(model, '')", "model"),
}


def _records(count: int, seed: int, *, back: timedelta = timedelta(days=2)) -> list[RequestRecord]:
    chance = random.Random(seed)
    keys = [None, uuid.UUID(int=1), uuid.UUID(int=2)]
    return [
        RequestRecord(
            id=new_id(),
            request_id="r",
            created_at=_NOW - back * chance.random(),
            route="/v1/chat/completions",
            status=200,
            outcome=chance.choice([Outcome.COMPLETED, Outcome.COMPLETED, *Outcome]),
            principal_id=chance.choice([None, "ann", "bob", "Zoë"]),
            model=chance.choice([None, "m", "n"]),
            api_key_id=chance.choice(keys),
            prompt_tokens=chance.randrange(100),
            completion_tokens=chance.randrange(100),
            cost_micros=chance.randrange(10**9),
            # Whole numbers, whose sums do not depend on the order.
            duration_ms=float(chance.randrange(1000)),
            time_to_first_token_ms=chance.choice([None, float(chance.randrange(100))]),
            replica_id=chance.choice([None, "replica-1", "replica-2"]),
        )
        for _ in range(count)
    ]


async def _assert_equal(connection: asyncpg.Connection) -> None:
    """Compare each table with what grouping the requests themselves gives."""
    for table, (unit, caller, columns) in _TABLES.items():
        kept = await connection.fetch(
            f"select bucket, {columns}, completed, {_MEASURES} from comp_ai.{table} "
            f"group by bucket, {columns}, completed order by bucket, {columns}, completed"
        )
        wanted = await connection.fetch(
            f"select date_trunc('{unit}', created_at, 'UTC'), {caller}, outcome = 'completed', "
            f"{_OF_REQUESTS} from comp_ai.requests group by 1, {caller}, outcome = 'completed'"
        )
        assert sorted(map(tuple, kept)) == sorted(map(tuple, wanted)), table


async def _pending(connection: asyncpg.Connection) -> int:
    return int(await connection.fetchval("select count(*) from comp_ai.usage_pending"))


@pytest.fixture
async def connection(connection: asyncpg.Connection) -> asyncpg.Connection:
    await writer.prepare_session(connection)
    return connection


async def test_repeats_and_late_rows_are_counted_once(connection: asyncpg.Connection) -> None:
    await connection.execute("select comp_ai.ensure_partitions('2026-11-01', 1)")
    records = _records(300, seed=1)
    late = _records(50, seed=2, back=timedelta(days=400))
    await writer.write(connection, records, subject_keys())
    await writer.write(connection, records, subject_keys())
    assert await fold(connection) > 0
    await _assert_equal(connection)
    await writer.write(connection, [*records, *late], subject_keys())
    await fold(connection, most_rows=7)
    await writer.write(connection, late, subject_keys())
    assert await _pending(connection) == 0
    assert await fold(connection) == 0
    await _assert_equal(connection)
    assert await connection.fetchval("select count(*) from comp_ai.requests") == 350


async def test_a_batch_with_a_bad_row_counts_the_others(connection: asyncpg.Connection) -> None:
    good = _records(20, seed=3)
    bad = replace(good[0], id=new_id(), prompt_tokens=-1)
    report = await writer.write(connection, [*good[:5], bad, *good[5:]], subject_keys())
    assert (report.written, len(report.poison)) == (20, 1)
    await fold(connection)
    await _assert_equal(connection)


async def test_rows_that_move_between_partitions_are_not_counted_again(
    connection: asyncpg.Connection,
) -> None:
    await writer.write(connection, _records(50, seed=4), subject_keys())
    await fold(connection)
    await connection.execute("select comp_ai.ensure_partitions('2026-11-01', 1)")
    assert await connection.fetchval("select count(*) from comp_ai.usage_day_default") == 0
    assert await _pending(connection) == 0
    await _assert_equal(connection)


async def test_a_fold_that_is_broken_off_adds_nothing(
    database: PostgresSettings, connection: asyncpg.Connection
) -> None:
    await writer.write(connection, _records(100, seed=5), subject_keys())
    before = await _pending(connection)
    folding = await connect(database, application_name="tests")
    await folding.execute("begin")
    await fold(folding)
    folding.terminate()
    assert await _pending(connection) == before
    async with asyncio.timeout(60):
        while await _pending(connection):
            # Rows are passed over until the server has noticed that the other one is gone.
            await fold(connection)
    await _assert_equal(connection)


async def _write_all(postgres: PostgresSettings, batches: Iterable[list[RequestRecord]]) -> None:
    connection = await connect(postgres, application_name="tests")
    await writer.prepare_session(connection)
    for batch in batches:
        await writer.write(connection, batch, subject_keys())
    await connection.close()


async def test_two_writers_and_an_upkeep_that_is_cut_again_and_again(
    database: PostgresSettings, connection: asyncpg.Connection
) -> None:
    link = Link(database)
    await link.mend()
    tasks = [replace(task, every_s=0.001) for task in usage_tasks()]
    config = UpkeepConfig(
        lock_again_s=0.01, failed_again_s=0.001, backoff_first_s=0.001, backoff_most_s=0.01
    )
    records = [_records(30, seed=seed) for seed in range(10, 40)]
    async with AsyncExitStack() as stack:
        for _ in range(2):
            upkeep = Upkeep(link.settings, tasks, NoMetrics(), config)
            upkeep.start()
            stack.push_async_callback(upkeep.close)
        # Each batch is written by both: the log repeats one whose answer was lost.
        writers = [asyncio.create_task(_write_all(database, records)) for _ in range(2)]
        while not all(task.done() for task in writers):
            await link.cut()
            await link.mend()
            await asyncio.wait(writers, timeout=0.05)
        await asyncio.gather(*writers)
        async with asyncio.timeout(60):
            while await _pending(connection):
                pass  # each question is a turn of the loop, so this does not spin
    assert await connection.fetchval("select count(*) from comp_ai.requests") == 900
    await _assert_equal(connection)


async def _insert_as_before(connection: asyncpg.Connection, records: list[RequestRecord]) -> None:
    """Insert as the release before did, which names its columns."""
    await connection.executemany(
        "insert into comp_ai.requests (id, request_id, created_at, route, status, outcome, "
        "principal_id, model, api_key_id, prompt_tokens, completion_tokens, duration_ms, "
        "time_to_first_token_ms) values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)",
        [
            (r.id, r.request_id, r.created_at, r.route, r.status, r.outcome.value, r.principal_id,
             r.model, r.api_key_id, r.prompt_tokens, r.completion_tokens, r.duration_ms,
             r.time_to_first_token_ms)
            for r in records
        ],
    )  # fmt: skip


async def test_the_trigger_and_the_backfill_add_up_alike(connection: asyncpg.Connection) -> None:
    trigger = await connection.fetchval("select prosrc from pg_proc where proname = 'append_usage'")
    backfill_day = named_queries("serve_app.usage", "folding.sql")["count_day"]
    assert _added_up(trigger, source="inserted") == _added_up(
        backfill_day, source="comp_ai.requests"
    )


def _added_up(sql: str, *, source: str) -> tuple[str, str]:
    """Return what is inserted of each group, and by what is grouped."""
    found = re.search(
        rf"(insert into .+?) from {source} .*?(group by [^;]+)", " ".join(sql.split())
    )
    assert found is not None, sql
    return found[1], found[2]


@pytest.fixture
def migrations_before(tmp_path: Path) -> Path:
    """The migrations of the release before the usage tables."""
    folder = Path(shutil.copytree(MIGRATIONS, tmp_path / "migrations"))
    for file in folder.iterdir():
        if file.name >= "0009":
            file.unlink()
    return folder


async def test_rows_from_before_the_migration_are_added_day_by_day(
    empty_database: PostgresSettings, migrations_before: Path
) -> None:
    await migrate(empty_database, directory=migrations_before)
    connection = await connect(empty_database, application_name="tests")
    await _insert_as_before(connection, _records(200, seed=6, back=timedelta(days=40)))
    await migrate(empty_database, directory=MIGRATIONS)
    # The release before may still write, and rows of a day may be on both sides of the change.
    await _insert_as_before(connection, _records(100, seed=7, back=timedelta(days=40)))
    await fold(connection)
    # Broken off in a day: that day is still on the list.
    broken = await connect(empty_database, application_name="tests")
    await broken.transaction().start()
    await backfill(broken)
    broken.terminate()
    async with asyncio.timeout(60):
        assert await backfill(connection) == 41
    assert await backfill(connection) == 0
    await _assert_equal(connection)
    assert await connection.fetchval("select count(*) from comp_ai.usage_day_default") == 0
    await connection.close()
