"""Upkeep of the accounts: what is done again and again, mostly by one process at a time."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import asyncpg

from serve_app.accounts.metrics import UpkeepMetrics
from serve_app.background import check_goes_on
from serve_app.backoff import Backoff
from serve_app.database import CONNECT_ERRORS, DatabaseUnavailable, connect
from serve_app.errors import CompAIError
from serve_app.settings import PostgresSettings
from serve_app.sql import named_queries

_logger = logging.getLogger(__name__)

_OUTAGES = (*CONNECT_ERRORS, asyncpg.InternalClientError, DatabaseUnavailable)
_ADVISORY_LOCK = 0x636F6D705F75706B  # "comp_upk" in ASCII


class UpkeepBroken(CompAIError):
    """The upkeep stopped working and must be started anew."""


@dataclass(frozen=True, slots=True)
class Task:
    """Something to do every `every_s`, at the start too.

    Args:
        name: for logs and as a label of metrics.
        run: does it on a connection of its own. Tasks run one after another, in the session
            that holds the lock: what it does through the connection happens in one process
            at a time. It may not reset the connection, which would give up the lock.
        timeout_s: longest time for one run and for each of its statements.
        by_all: done by those that wait for the lock too, because it is about what only some
            machines have, as a folder.
    """

    name: str
    every_s: float
    run: Callable[[asyncpg.Connection], Awaitable[None]]
    timeout_s: float = 600.0
    by_all: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class UpkeepConfig:
    """How the upkeep tries. What fails is done again after `failed_again_s`, or its own time."""

    lock_again_s: float = 3.0
    failed_again_s: float = 60.0
    tell_again_s: float = 5.0
    answer_timeout_s: float = 30.0
    backoff_first_s: float = 0.5
    backoff_most_s: float = 15.0


class Upkeep:
    """Runs tasks while its session holds an advisory lock of the database.

    Of several, one holds it and works; the others ask for it every few seconds. PostgreSQL may
    be away. A task that fails is logged, and the others go on.
    """

    def __init__(
        self,
        postgres: PostgresSettings,
        tasks: Sequence[Task],
        metrics: UpkeepMetrics,
        config: UpkeepConfig | None = None,
    ) -> None:
        self._postgres = postgres
        self._tasks = tuple(tasks)
        self._metrics = metrics
        self._config = config or UpkeepConfig()
        self._backoff = Backoff(self._config.backoff_first_s, self._config.backoff_most_s)
        self._by_all = tuple(task for task in self._tasks if task.by_all)
        self._due_s = dict.fromkeys(self._tasks, 0.0)
        self._connection: asyncpg.Connection | None = None
        self._working: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin; PostgreSQL may be away."""
        self._working = asyncio.create_task(self._work_for_ever(), name="upkeep")

    def check(self) -> None:
        """Say nothing where the upkeep goes on.

        Raises:
            UpkeepBroken: it was not started, or it ended; says of what.
        """
        if self._working is None:
            raise UpkeepBroken("The upkeep was not started.")
        check_goes_on(self._working, "The upkeep ended", UpkeepBroken)

    async def close(self) -> None:
        """Stop; what is under way is undone."""
        if self._connection is not None:
            self._connection.terminate()  # else a cancelled statement waits for its rollback
        if self._working is not None:
            self._working.cancel()
            # One that died of an error has said so in `check`.
            await asyncio.gather(self._working, return_exceptions=True)

    async def _work_for_ever(self) -> None:
        while True:
            try:
                async with self._session() as connection:
                    await self._take_lock(connection)
                    await self._work(connection)
            except _OUTAGES as error:
                self._note_outage(error)
                await asyncio.sleep(self._backoff.next_s())

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[asyncpg.Connection]:
        connection = await connect(self._postgres, application_name="comp-ai upkeep")
        self._connection = connection
        try:
            with _cut_after(self._config.answer_timeout_s, connection):
                await connection.execute(_query("session"))
            yield connection
        finally:
            self._connection = None
            self._metrics.upkeep_left()
            # Not `close`: it would wait for a server that may not answer any more.
            connection.terminate()

    async def _take_lock(self, connection: asyncpg.Connection) -> None:
        while not await self._took_lock(connection):
            self._backoff.reset()
            await self._run_due(self._by_all, connection)
            longest_s = self._config.lock_again_s
            await asyncio.sleep(random.uniform(longest_s / 2, longest_s))  # noqa: S311
        _logger.info("this process does the upkeep", extra={"action": "upkeep.taken"})

    async def _took_lock(self, connection: asyncpg.Connection) -> bool:
        # Asked again and again: to wait for it in a statement would hold up the vacuum.
        with _cut_after(self._config.answer_timeout_s, connection):
            return bool(await connection.fetchval(_query("take_lock"), _ADVISORY_LOCK))

    async def _work(self, connection: asyncpg.Connection) -> None:
        while True:
            await self._run_due(self._tasks, connection)
            self._backoff.reset()
            await asyncio.sleep(self._idle_s())
            if connection.is_closed():
                raise ConnectionResetError

    async def _run_due(self, tasks: Sequence[Task], connection: asyncpg.Connection) -> None:
        for task in tasks:
            if self._due_s[task] <= time.monotonic():
                await self._run(task, connection)
        self._metrics.upkeep_goes_on()

    def _idle_s(self) -> float:
        first_due_s = min(self._due_s.values(), default=float("inf"))
        return max(0.0, min(first_due_s - time.monotonic(), self._config.tell_again_s))

    async def _run(self, task: Task, connection: asyncpg.Connection) -> None:
        started_s = time.monotonic()
        error = await self._outcome(task, connection)
        if error is None:
            self._due_s[task] = started_s + task.every_s
            self._metrics.upkeep_succeeded(task.name, time.monotonic() - started_s)
            return
        again_s = min(task.every_s, self._config.failed_again_s)
        self._due_s[task] = time.monotonic() + again_s
        self._note_failure(task, error)
        if connection.is_closed():
            raise ConnectionResetError from error

    async def _outcome(self, task: Task, connection: asyncpg.Connection) -> BaseException | None:
        """Run `task`; return what it failed of, whatever that is: the others must go on."""
        # The statement's own timeout comes first, and leaves the session as it is.
        with _cut_after(task.timeout_s + self._config.answer_timeout_s, connection):
            await connection.execute(_query("limit_statements"), str(round(task.timeout_s * 1000)))
            running = asyncio.ensure_future(task.run(connection))
            try:
                while not (await asyncio.wait({running}, timeout=self._config.tell_again_s))[0]:
                    self._metrics.upkeep_goes_on()
            finally:
                running.cancel()
        return asyncio.CancelledError() if running.cancelled() else running.exception()

    def _note_failure(self, task: Task, error: BaseException) -> None:
        self._metrics.upkeep_failed(task.name)
        _logger.warning(
            "the upkeep failed at %s",
            task.name,
            # The class only: a message of PostgreSQL may quote the values of a row.
            extra={"action": "upkeep.failed", "task": task.name, "error": type(error).__name__},
        )

    def _note_outage(self, error: Exception) -> None:
        cause = error.__cause__ or error
        _logger.warning(
            "the upkeep waits for PostgreSQL",
            extra={"action": "upkeep.postgres_away", "error": type(cause).__name__},
        )


@contextmanager
def _cut_after(seconds: float, connection: asyncpg.Connection) -> Iterator[None]:
    """Cut the connection if what runs inside takes longer.

    A timeout by cancellation would still wait for the rollback, on a link that is dead.
    """
    handle = asyncio.get_running_loop().call_later(seconds, connection.terminate)
    try:
        yield
    finally:
        handle.cancel()


def _query(name: str) -> str:
    return named_queries("serve_app.accounts", "upkeep.sql")[name]
