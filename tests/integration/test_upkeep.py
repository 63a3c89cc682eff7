"""Upkeep: done by one of several, taken over from one that died, and not stopped by a failure."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import asyncpg
import pytest

from serve_app.accounts.metrics import NoMetrics
from serve_app.accounts.partitions import partitions_task
from serve_app.accounts.upkeep import Task, Upkeep, UpkeepBroken, UpkeepConfig
from serve_app.settings import PostgresSettings
from tests.integration.conftest import PostgresServer
from tests.integration.links import Link

_TIMEOUT_S = 60.0
_CONFIG = UpkeepConfig(
    lock_again_s=0.01,
    failed_again_s=0.01,
    tell_again_s=0.01,
    backoff_first_s=0.01,
    backoff_most_s=0.05,
)
_ASKED = "select count(*) from pg_stat_activity where query like '%try_advisory_lock%' and pid = $1"


class Metrics(NoMetrics):
    """Keeps what was told."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.failed: list[str] = []
        self.ahead: list[int] = []
        self.left = 0
        self.news = asyncio.Event()

    def upkeep_succeeded(self, task: str, seconds: float) -> None:
        self.done.append(task)
        self.news.set()

    def upkeep_failed(self, task: str) -> None:
        self.failed.append(task)
        self.news.set()

    def upkeep_left(self) -> None:
        self.left += 1
        self.news.set()

    def partitions_ahead(self, months: int) -> None:
        self.ahead.append(months)

    async def until(self, reached: Callable[[], bool]) -> None:
        async with asyncio.timeout(_TIMEOUT_S):
            while not reached():
                self.news.clear()
                await self.news.wait()


async def _nothing(connection: asyncpg.Connection) -> None:
    await connection.execute("select 1")


@asynccontextmanager
async def _upkeep(
    postgres: PostgresSettings, *tasks: Task, config: UpkeepConfig = _CONFIG
) -> AsyncIterator[tuple[Upkeep, Metrics]]:
    metrics = Metrics()
    upkeep = Upkeep(postgres, tasks, metrics, config)
    upkeep.start()
    try:
        yield upkeep, metrics
    finally:
        await upkeep.close()


async def _until_refused(server: asyncpg.Connection, upkeep: Upkeep) -> None:
    """Wait until `upkeep` has asked for the lock and did not get it."""
    async with asyncio.timeout(_TIMEOUT_S):
        while not await server.fetchval(_ASKED, _pid(upkeep)):
            pass  # each question is a turn of the loop, so this does not spin


def _pid(upkeep: Upkeep) -> int | None:
    return upkeep._connection.get_server_pid() if upkeep._connection else None


async def test_one_of_two_works_and_the_other_takes_over(
    database: PostgresSettings, connection: asyncpg.Connection
) -> None:
    link = Link(database)
    await link.mend()
    task = Task("often", 0.001, _nothing)
    async with (
        _upkeep(link.settings, task) as (first, of_first),
        _upkeep_after(of_first, database, task) as (second, of_second),
    ):
        await _until_refused(connection, second)
        seen = len(of_first.done)
        await of_first.until(lambda: len(of_first.done) > seen + 10)
        assert of_second.done == []
        await link.cut()
        await of_second.until(lambda: len(of_second.done) > 10)
        assert of_first.left > 0
        first.check()  # it tries on
        second.check()


async def test_who_waits_for_the_lock_does_what_all_do(database: PostgresSettings) -> None:
    tasks = [Task("one", 0.001, _nothing), Task("all", 0.001, _nothing, by_all=True)]
    async with (
        _upkeep(database, *tasks) as (_, of_first),
        _upkeep_after(of_first, database, *tasks) as (_, of_second),
    ):
        await of_second.until(lambda: len(of_second.done) > 10)
        assert set(of_second.done) == {"all"}
        assert set(of_first.done) == {"one", "all"}


@asynccontextmanager
async def _upkeep_after(
    first: Metrics, postgres: PostgresSettings, *tasks: Task
) -> AsyncIterator[tuple[Upkeep, Metrics]]:
    await first.until(lambda: len(first.done) > 0)
    async with _upkeep(postgres, *tasks) as second:
        yield second


async def test_a_failure_stops_no_other_task_and_is_tried_again(
    database: PostgresSettings, caplog: pytest.LogCaptureFixture
) -> None:
    failed = 0

    async def fails_twice(connection: asyncpg.Connection) -> None:
        nonlocal failed
        failed += 1
        if failed == 1:
            raise KeyError("secret")
        if failed == 2:
            await connection.execute("select 1/0")

    tasks = Task("bad", 3600.0, fails_twice), Task("good", 3600.0, _nothing)
    async with _upkeep(database, *tasks) as (upkeep, metrics):
        await metrics.until(lambda: "bad" in metrics.done)
        upkeep.check()
    assert metrics.done == ["good", "bad"]
    assert metrics.failed == ["bad", "bad"]
    lines = [r for r in caplog.records if getattr(r, "action", "") == "upkeep.failed"]
    assert [vars(line)["error"] for line in lines] == ["KeyError", "DivisionByZeroError"]
    assert "secret" not in caplog.text


async def test_a_statement_that_hangs_is_ended_and_the_others_go_on(
    database: PostgresSettings,
) -> None:
    async def hangs(connection: asyncpg.Connection) -> None:
        await connection.execute("select pg_sleep(600)")

    tasks = Task("slow", 3600.0, hangs, timeout_s=0.05), Task("good", 0.001, _nothing)
    async with _upkeep(database, *tasks) as (_, metrics):
        await metrics.until(lambda: len(metrics.done) > 2)
    assert set(metrics.done) == {"good"}


async def test_postgres_may_be_away_and_come_back(own_server: PostgresServer) -> None:
    task = Task("often", 0.001, _nothing)
    async with _upkeep(own_server.embedded.settings(), task) as (upkeep, metrics):
        await metrics.until(lambda: len(metrics.done) > 0)
        await asyncio.to_thread(own_server.kill)
        await metrics.until(lambda: metrics.left > 0)
        seen = len(metrics.done)
        await asyncio.to_thread(own_server.start)
        await metrics.until(lambda: len(metrics.done) > seen)
        upkeep.check()


async def test_check_says_that_it_ended(database: PostgresSettings) -> None:
    upkeep = Upkeep(database, [], Metrics())
    with pytest.raises(UpkeepBroken, match="not started"):
        upkeep.check()
    upkeep.start()
    upkeep.check()
    await upkeep.close()
    with pytest.raises(UpkeepBroken, match="ended: cancelled"):
        upkeep.check()


async def test_partitions_are_made_ahead(
    database: PostgresSettings, connection: asyncpg.Connection
) -> None:
    metrics = Metrics()
    task = partitions_task(metrics)
    async with _upkeep(database, task) as (_, of_upkeep):
        await of_upkeep.until(lambda: "partitions" in of_upkeep.done)
    assert metrics.ahead == [2]
    for parent in ("requests", "request_bodies", "usage_minute", "usage_hour", "usage_day"):
        count = "select count(*) from pg_inherits where inhparent = ('comp_ai.' || $1)::regclass"
        assert await connection.fetchval(count, parent) == 4  # three months and the default


async def test_a_month_without_its_partition_is_told(
    database: PostgresSettings, connection: asyncpg.Connection
) -> None:
    metrics = Metrics()
    task = partitions_task(metrics)
    await connection.execute("alter function comp_ai.ensure_partitions rename to no_such_function")
    async with _upkeep(database, task) as (_, of_upkeep):
        await of_upkeep.until(lambda: of_upkeep.failed != [])
    assert metrics.ahead[0] == -1
    await connection.execute("alter function comp_ai.no_such_function rename to ensure_partitions")
    await connection.execute(
        "select comp_ai.ensure_partitions((now() at time zone 'UTC')::date, 1)"
    )
    await replace(task, every_s=1.0).run(connection)
    assert metrics.ahead[-1] == 2
