"""What the limits know after a restart, a SIGKILL, a lost disk, and while PostgreSQL is away."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from serve_app.contracts import Limit, Reservation, Scope, Settlement, Spent
from serve_app.database import connect, migrate
from serve_app.errors import HandedOver, LimitsUnavailable
from serve_app.lazy_pool import build_pool
from serve_app.limits import journal as journal_module
from serve_app.limits.book import Change
from serve_app.limits.journal import Journal
from serve_app.limits.keeping import LimitKeeping, LimitsBroken
from serve_app.limits.usage_store import UsageStore
from serve_app.settings import PostgresSettings
from tests.integration.conftest import MIGRATIONS, PostgresServer

BUDGET = Scope(key="principal:ada", label="you", tokens_per_day=1000, cost_per_month=5_000_000)
MINUTE = Scope(
    key="principal:ada", label="you", requests_per_minute=3, tokens_per_minute=500, concurrency=2
)
NO_POSTGRES = PostgresSettings(POSTGRES_HOST="/nowhere")


class Clock:
    """Seconds since 1970, which a test can move on."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead_s


class Told:
    """What the metric said last."""

    def __init__(self) -> None:
        self.held_back: bool | None = None

    def budgets_held_back(self, held_back: bool) -> None:
        self.held_back = held_back


def reservation(scope: Scope, tokens: int = 10, cost_micros: int = 0) -> Reservation:
    most = Spent(tokens=tokens, cost_micros=cost_micros)
    return Reservation(id=uuid.uuid4(), scopes=(scope,), most=most)


def settled(of: Reservation, tokens: int = 0, cost_micros: int = 0) -> Settlement:
    spent = Spent(tokens=tokens, cost_micros=cost_micros)
    return Settlement(id=of.id, accounts=tuple(s.key for s in of.scopes), spent=spent)


def keeping(
    folder: Path,
    postgres: PostgresSettings,
    clock: Clock | None = None,
    told: Told | None = None,
) -> LimitKeeping:
    pool = build_pool(postgres, application_name="tests", max_size=1, unavailable=LimitsUnavailable)
    clock = clock or Clock()
    return LimitKeeping(
        Journal(folder, lock_timeout_s=10),
        UsageStore(pool),
        told or Told(),
        clock_s=clock,
        wall_s=clock,
    )


@asynccontextmanager
async def limits(
    folder: Path,
    postgres: PostgresSettings,
    clock: Clock | None = None,
    told: Told | None = None,
) -> AsyncIterator[LimitKeeping]:
    kept = keeping(folder, postgres, clock, told)
    await kept.start()
    try:
        yield kept
    finally:
        await kept.close()


async def left(kept: LimitKeeping, scope: Scope, limit: Limit) -> int:
    [state] = [state for state in await kept.standing([scope]) if state.limit is limit]
    return state.window.remaining


async def test_everything_is_known_after_a_restart(
    tmp_path: Path, database: PostgresSettings
) -> None:
    async with limits(tmp_path, database) as kept:
        done, running = reservation(MINUTE, 200), reservation(MINUTE, 100)
        for one in (done, running):
            assert (await kept.reserve(one)).refusal is None
        await kept.settle(settled(done, 150, 70))
    async with limits(tmp_path, database) as kept:
        assert await left(kept, MINUTE, Limit.REQUESTS_PER_MINUTE) == 1
        assert await left(kept, MINUTE, Limit.TOKENS_PER_MINUTE) == 500 - 150 - 100
        assert await left(kept, MINUTE, Limit.CONCURRENCY) == 1
        assert await left(kept, BUDGET, Limit.TOKENS_PER_DAY) == 1000 - 150 - 100
        assert await left(kept, BUDGET, Limit.COST_PER_MONTH) == 5_000_000 - 70
        # Told again, as its answer may have been lost.
        await kept.settle(settled(done, 150, 70))
        await kept.settle(settled(running, 40))
        assert await left(kept, BUDGET, Limit.TOKENS_PER_DAY) == 1000 - 150 - 40


async def test_what_ended_long_ago_is_kept_as_a_total(
    tmp_path: Path, database: PostgresSettings
) -> None:
    clock = Clock()
    async with limits(tmp_path, database) as kept:
        for _ in range(5):
            one = reservation(BUDGET)
            await kept.reserve(one)
            await kept.settle(settled(one, 10))
    # Not over midnight, where the day would begin with nothing.
    month = Scope(key=BUDGET.key, label="you", tokens_per_month=1000)
    for _ in range(2):
        clock.ahead_s += 130
        async with limits(tmp_path, database, clock) as kept:
            assert await left(kept, month, Limit.TOKENS_PER_MONTH) == 1000 - 50
            await kept._keep()
            past, totals = await kept._journal.read()
            assert not past
            assert {total.spent.tokens for total in totals} == {50}


_ASKER = """
    import asyncio, sys, uuid
    from pathlib import Path
    from serve_app.contracts import Reservation, Scope, Settlement, Spent
    from serve_app.errors import LimitsUnavailable
    from serve_app.lazy_pool import build_pool
    from serve_app.limits.journal import Journal
    from serve_app.limits.keeping import LimitKeeping, NoLimitMetrics
    from serve_app.limits.usage_store import UsageStore
    from serve_app.settings import PostgresSettings

    SCOPE = Scope(key="principal:ada", label="you")

    async def ask(kept):
        while True:
            one = Reservation(id=uuid.uuid4(), scopes=(SCOPE,), most=Spent(tokens=9))
            await kept.reserve(one)
            await kept.settle(Settlement(id=one.id, accounts=(SCOPE.key,), spent=Spent(tokens=7)))
            sys.stdout.write("settled\\n")
            sys.stdout.flush()

    async def main():
        postgres = PostgresSettings(POSTGRES_HOST="/nowhere")
        pool = build_pool(
            postgres, application_name="tests", max_size=1, unavailable=LimitsUnavailable
        )
        kept = LimitKeeping(Journal(Path(sys.argv[1])), UsageStore(pool), NoLimitMetrics())
        await kept.start()
        await asyncio.gather(*(ask(kept) for _ in range(20)))

    asyncio.run(main())
"""


async def test_what_was_answered_outlives_sigkill(
    tmp_path: Path, database: PostgresSettings
) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(_ASKER), tmp_path, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    told = [await process.stdout.readline() for _ in range(500)]
    process.send_signal(signal.SIGKILL)
    told += [line async for line in process.stdout if line.endswith(b"\n")]
    await process.wait()
    async with limits(tmp_path, database) as kept:
        scope = Scope(key="principal:ada", label="you", tokens_per_month=10**9)
        used = 10**9 - await left(kept, scope, Limit.TOKENS_PER_MONTH)
        # The twenty that were under way may be reserved, or settled and not yet told.
        assert 7 * len(told) <= used <= 7 * len(told) + 20 * 9


async def test_lost_disk_leaves_what_was_stored_in_postgresql(
    tmp_path: Path, database: PostgresSettings
) -> None:
    async with limits(tmp_path / "first", database) as kept:
        one = reservation(BUDGET, 400)
        await kept.reserve(one)
        await kept.settle(settled(one, 300, 40))
    async with limits(tmp_path / "second", database) as kept:
        assert await left(kept, BUDGET, Limit.TOKENS_PER_DAY) == 700
        assert await left(kept, BUDGET, Limit.COST_PER_MONTH) == 5_000_000 - 40
        two = reservation(BUDGET, 100)
        await kept.reserve(two)
        await kept.settle(settled(two, 50))
    # The first disk is back, and so is the second.
    for name in ("first", "second", "first"):
        async with limits(tmp_path / name, database) as kept:
            assert await left(kept, BUDGET, Limit.TOKENS_PER_DAY) == 650


async def test_late_word_is_not_undone_by_what_postgresql_was_told_before(
    tmp_path: Path, database: PostgresSettings
) -> None:
    clock = Clock()
    async with limits(tmp_path, database, clock) as kept:
        lost = reservation(BUDGET, 400)
        await kept.reserve(lost)
        clock.ahead_s += 16
        await kept._keep()  # it is given up, and PostgreSQL is told of all 400
        await kept.settle(settled(lost, 100))
    async with limits(tmp_path, database, clock) as kept:
        assert await left(kept, BUDGET, Limit.TOKENS_PER_DAY) == 900


async def test_new_journal_without_postgresql_grants_no_budget(tmp_path: Path) -> None:
    # Not when it is opened again either.
    for _ in range(2):
        told = Told()
        async with limits(tmp_path, NO_POSTGRES, told=told) as kept:
            with pytest.raises(LimitsUnavailable):
                await kept.reserve(reservation(BUDGET))
            assert told.held_back
            # What needs no budget is served.
            assert (await kept.reserve(reservation(MINUTE))).refusal is None


async def test_journal_that_others_may_have_overtaken_waits_for_postgresql(
    tmp_path: Path, database: PostgresSettings
) -> None:
    clock = Clock()
    # Not of a day, which might end meanwhile.
    month = Scope(key=BUDGET.key, label="you", tokens_per_month=1000)
    async with limits(tmp_path / "first", database, clock) as kept:
        one = reservation(month, 400)
        await kept.reserve(one)
        await kept.settle(settled(one, 300))
    # Another node counts for a while, and then PostgreSQL is away and the first node is back.
    async with limits(tmp_path / "second", database, clock) as kept:
        two = reservation(month, 600)
        await kept.reserve(two)
        await kept.settle(settled(two, 600))
    clock.ahead_s += 61
    told = Told()
    for _ in range(2):
        async with limits(tmp_path / "first", NO_POSTGRES, clock, told) as kept:
            with pytest.raises(LimitsUnavailable):
                await kept.reserve(reservation(month, 200))
            assert told.held_back
    async with limits(tmp_path / "first", database, clock, told) as kept:
        assert not told.held_back
        assert (await kept.reserve(reservation(month, 200))).refusal is not None
        assert (await kept.reserve(reservation(month, 100))).refusal is None


async def test_known_journal_works_without_postgresql(
    tmp_path: Path, database: PostgresSettings
) -> None:
    async with limits(tmp_path, database) as kept:
        one = reservation(BUDGET, 400)
        await kept.reserve(one)
        await kept.settle(settled(one, 300))
    async with limits(tmp_path, NO_POSTGRES) as kept:
        assert (await kept.reserve(reservation(BUDGET, 700))).refusal is None
        assert (await kept.reserve(reservation(BUDGET, 1))).refusal is not None


async def test_what_cannot_be_written_is_not_granted(
    tmp_path: Path, database: PostgresSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with limits(tmp_path, database) as kept:
        running = reservation(MINUTE, 100)
        await kept.reserve(running)

        def broken(*_: object) -> None:
            raise sqlite3.OperationalError("disk I/O error")

        with monkeypatch.context() as patch:
            patch.setattr(journal_module, "write", broken)
            with pytest.raises(LimitsUnavailable):
                await kept.reserve(reservation(MINUTE, 100))
            with pytest.raises(LimitsUnavailable):
                await kept.settle(settled(running, 80))
        assert await left(kept, MINUTE, Limit.CONCURRENCY) == 2
        await kept.settle(settled(running, 80))
    async with limits(tmp_path, database) as kept:
        assert await left(kept, MINUTE, Limit.TOKENS_PER_MINUTE) == 500 - 80


async def test_many_at_once_share_a_commit(
    tmp_path: Path, database: PostgresSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[int] = []
    write = journal_module.write

    def counted(connection: sqlite3.Connection, changes: list[Change]) -> None:
        groups.append(len(changes))
        write(connection, changes)

    monkeypatch.setattr(journal_module, "write", counted)
    async with limits(tmp_path, database) as kept:
        asked = [reservation(BUDGET, 1) for _ in range(200)]
        await asyncio.gather(*(kept.reserve(one) for one in asked))
        assert groups == [200]
        await asyncio.gather(*(kept.settle(settled(one, 1)) for one in asked))
        assert await left(kept, BUDGET, Limit.TOKENS_PER_DAY) == 800


async def test_successor_waits_until_it_is_handed_everything(
    tmp_path: Path, database: PostgresSettings
) -> None:
    successor = keeping(tmp_path / "here", database)
    async with limits(tmp_path / "here", database) as before:
        done, running = reservation(MINUTE, 200), reservation(MINUTE, 100)
        await before.reserve(done)
        starting = asyncio.create_task(successor.start())
        async with asyncio.timeout(10):
            await before.until_wanted()
        assert not starting.done()
        # All go on being served meanwhile, and what is under way at the end is answered.
        assert (await before.reserve(running)).refusal is None
        settling = asyncio.create_task(before.settle(settled(done, 150)))
        await asyncio.sleep(0)
        await before.hand_over()
        await settling
        await starting
        for late in (
            before.reserve(reservation(MINUTE)),
            before.settle(settled(running, 40)),
            before.renew([running.id]),
            before.adopt([settled(running, 100)]),
            before.standing([MINUTE]),
        ):
            with pytest.raises(HandedOver):
                await late
        with pytest.raises(LimitsBroken):
            before.check()
        successor.check()
        assert await left(successor, MINUTE, Limit.REQUESTS_PER_MINUTE) == 1
        assert await left(successor, MINUTE, Limit.TOKENS_PER_MINUTE) == 500 - 150 - 100
        assert await left(successor, BUDGET, Limit.TOKENS_PER_DAY) == 1000 - 150 - 100
        await successor.settle(settled(running, 40))
    # PostgreSQL is told by the successor alone.
    await successor.close()
    async with limits(tmp_path / "elsewhere", database) as other:
        assert await left(other, BUDGET, Limit.TOKENS_PER_DAY) == 1000 - 150 - 40


async def test_handing_over_gives_back_what_could_not_be_written(
    tmp_path: Path, database: PostgresSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    successor = keeping(tmp_path, database)
    async with limits(tmp_path, database) as before:
        starting = asyncio.create_task(successor.start())
        await before.until_wanted()

        def full(_connection: sqlite3.Connection, _changes: list[Change]) -> None:
            raise sqlite3.OperationalError

        with monkeypatch.context() as patch:
            patch.setattr(journal_module, "write", full)
            asked = asyncio.create_task(before.reserve(reservation(MINUTE, 200)))
            await asyncio.sleep(0)
            await before.hand_over()
            with pytest.raises(LimitsUnavailable):
                await asked
        await starting
        assert await left(successor, MINUTE, Limit.TOKENS_PER_MINUTE) == 500
    await successor.close()


async def test_one_process_holds_a_journal(tmp_path: Path, database: PostgresSettings) -> None:
    async with limits(tmp_path, database) as kept:
        kept.check()
        second = asyncio.create_task(_start_and_close(tmp_path, database))
        await asyncio.sleep(0.2)
        assert not second.done()
    await second


async def _start_and_close(folder: Path, postgres: PostgresSettings) -> None:
    async with limits(folder, postgres):
        pass


async def test_migration_counts_what_this_month_has_used(
    postgres_server: PostgresServer, empty_database: PostgresSettings, tmp_path: Path
) -> None:
    before = tmp_path / "before"
    before.mkdir()
    [ours] = MIGRATIONS.glob("*_limit_usage.sql")
    for file in MIGRATIONS.glob("*.sql"):
        if file.name < ours.name:
            (before / file.name).write_text(file.read_text())
    await migrate(empty_database, directory=before)
    connection = await connect(empty_database, application_name="tests")
    key = uuid.uuid4()
    insert = (
        "insert into comp_ai.requests (id, created_at, request_id, route, status, outcome, "
        "principal_id, api_key_id, prompt_tokens, completion_tokens) "
        "values (gen_random_uuid(), now() - $1::interval, 'r', 'r', 200, 'completed', $2, $3, 3, 4)"
    )
    for age, principal in ((0, "ada"), (0, "ben"), (40, "ada")):
        await connection.execute(insert, timedelta(days=age), principal, key)
    await connection.close()
    await migrate(empty_database, directory=MIGRATIONS)
    async with limits(tmp_path / "limits", empty_database) as kept:
        for account, used in (("everyone", 14), ("principal:ada", 7), (f"api_key:{key}", 14)):
            scope = Scope(key=account, label="", tokens_per_month=100, tokens_per_day=100)
            assert await left(kept, scope, Limit.TOKENS_PER_MONTH) == 100 - used
            assert await left(kept, scope, Limit.TOKENS_PER_DAY) == 100 - used
