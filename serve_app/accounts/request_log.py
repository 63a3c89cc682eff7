"""The request log: takes records at once, and sees them into PostgreSQL.

`append` answers when the record is in the spool. One task, the drain, moves rows from the
spool to PostgreSQL for as long as the log lives, and survives PostgreSQL's absences. It empties
the spools of others too, once nobody holds them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

import asyncpg

from serve_app.accounts import writer
from serve_app.accounts.adoption import Adoption
from serve_app.accounts.batch_reader import SEAL_ERRORS, Batch, BatchReader
from serve_app.accounts.log_spans import LogSpans
from serve_app.accounts.metrics import LogMetrics
from serve_app.accounts.redaction import Redactor
from serve_app.accounts.sealing.subject_keys import SubjectKeys
from serve_app.accounts.spool import Spool
from serve_app.accounts.spool_folders import SpoolFolders
from serve_app.background import check_goes_on
from serve_app.backoff import Backoff
from serve_app.database import CONNECT_ERRORS, DatabaseUnavailable, connect
from serve_app.errors import CompAIError, LogUnavailable
from serve_app.records import RequestRecord
from serve_app.settings import PostgresSettings
from serve_app.tracing.spans import SpanSink

_logger = logging.getLogger(__name__)

_First = TypeVar("_First")
_Second = TypeVar("_Second")

# A spool that refuses (disk full) is an outage like PostgreSQL's: wait and try again. So is a
# master key that is missing: the operator has it, and until then the records are safe here.
_OUTAGES = (
    *CONNECT_ERRORS,
    asyncpg.InternalClientError,
    DatabaseUnavailable,
    LogUnavailable,
    *SEAL_ERRORS,
)


class LogBroken(CompAIError):
    """The request log stopped working and must be replaced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """How the log drains."""

    batch_rows: int = 1000
    batch_bytes: int = 8 * 1024 * 1024
    write_timeout_s: float = 30.0
    backoff_first_s: float = 0.2
    backoff_most_s: float = 10.0
    gauges_every_s: float = 1.0
    adopt_every_s: float = 5.0
    room_timeout_s: float = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LogStatus:
    """How the log is. `last_error` is a class name; counts are since the start.

    `depth` and `lag_s` are of its own spool and of those that it has adopted.
    """

    depth: int
    lag_s: float
    postgres_ok: bool
    last_write_ms: float | None
    written_total: int
    poison_total: int
    last_error: str | None


class RequestLog:
    """Owns a spool and the task that drains it.

    Args:
        spool: its own; opened by `start` where it is not open.
        postgres: where the records go.
        metrics: where the measurements go.
        config: how it drains.
        folders: where to look for spools that nobody holds; it adopts none where None.
        sink: where the spans of traced records go; None while tracing is off.
    """

    def __init__(
        self,
        *,
        spool: Spool,
        postgres: PostgresSettings,
        keys: SubjectKeys,
        metrics: LogMetrics,
        config: LogConfig | None = None,
        redactor: Redactor | None = None,
        folders: SpoolFolders | None = None,
        sink: SpanSink | None = None,
    ) -> None:
        self._spool = spool
        self._keys = keys
        self._reader = BatchReader(redactor or Redactor(), metrics)
        self._postgres = postgres
        self._metrics = metrics
        self._spans = LogSpans(sink)
        self._config = config or LogConfig()
        self._adopted = Adoption(folders, self._config.adopt_every_s)
        self._drain_task: asyncio.Task[None] | None = None
        self._tell_task: asyncio.Task[None] | None = None
        self._connection: asyncpg.Connection | None = None
        self._work = asyncio.Event()  # something may have to be done
        self._empty = asyncio.Event()  # nothing was left when the drain last looked
        self._hurry = asyncio.Event()  # somebody waits for the spool to empty: no backoff
        self._failures = 0
        self._backoff = Backoff(self._config.backoff_first_s, self._config.backoff_most_s)
        self._postgres_ok = False
        self._last_write_ms: float | None = None
        self._written = 0
        self._poisoned = 0
        self._last_error: str | None = None
        self._full = False

    async def start(self) -> None:
        """Open the spool and start draining; PostgreSQL need not be there.

        Raises:
            ConfigError: the spool cannot be opened, or another process holds it.
        """
        if not self._spool.alive:
            await self._spool.open()
        self._work.set()
        self._drain_task = asyncio.create_task(self._drain_for_ever(), name="request-log-drain")
        self._tell_task = asyncio.create_task(self._tell_for_ever(), name="request-log-gauges")

    async def append(self, record: RequestRecord) -> None:
        """Return once `record` is on disk; safe to repeat, and done even if cancelled.

        Raises:
            LogUnavailable: the record is not known to be safe.
        """
        try:
            with self._spans.spooling(record):
                await self._spool.append(record)
        finally:
            # Also when this task is cancelled: the spool writes the record all the same.
            self._empty.clear()
            self._work.set()

    async def has_room(self) -> bool:
        """Tell whether new requests may count on being recorded here."""
        try:
            async with asyncio.timeout(self._config.room_timeout_s):
                room = await self._spool.has_room()
        except (LogUnavailable, TimeoutError):
            room = False
        self._note_full(not room)
        return room

    def check(self) -> None:
        """Say nothing where the log works; PostgreSQL's absence is not a fault of ours.

        Raises:
            LogBroken: the drain or the spool is dead; says which.
        """
        if self._drain_task is None or self._tell_task is None:
            raise LogBroken("The request log was not started.")
        check_goes_on(self._drain_task, "The drain of the request log ended", LogBroken)
        check_goes_on(self._tell_task, "The telling of the request log ended", LogBroken)
        if not self._spool.alive:
            raise LogBroken("The spool of the request log ended.")

    async def status(self) -> LogStatus:
        """Return how the log is.

        Raises:
            LogUnavailable: the spool cannot be read.
        """
        depth, lag_s = await self._waiting()
        return LogStatus(
            depth=depth,
            lag_s=lag_s,
            postgres_ok=self._postgres_ok,
            last_write_ms=self._last_write_ms,
            written_total=self._written,
            poison_total=self._poisoned,
            last_error=self._last_error,
        )

    async def drain(self, timeout_s: float) -> bool:
        """Wait until every record appended before is in PostgreSQL; False after `timeout_s`.

        What is left then stays in the spool, for the next start or for who adopts it.
        """
        self._hurry.set()
        self._work.set()
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            return False
        finally:
            self._hurry.clear()
        return True

    async def close(self) -> None:
        """Stop draining and close the spool; what is in it stays there."""
        if self._connection is not None:
            self._connection.terminate()  # else the cancelled write would wait for its rollback
        tasks = [task for task in (self._drain_task, self._tell_task) if task is not None]
        for task in tasks:
            task.cancel()
        # One that died of an error has said so in `check`.
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._adopted.close()
        await self._spool.close()

    # The drain.

    async def _drain_for_ever(self) -> None:
        while True:
            try:
                async with self._session() as connection:
                    await self._drain_session(connection)
            except _OUTAGES as error:
                self._note(error)
                await self._back_off()

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[asyncpg.Connection]:
        connection = await connect(self._postgres, application_name="comp-ai request-log")
        try:
            self._connection = connection
            # An idle drain learns at once that the server left.
            connection.add_termination_listener(lambda _: self._work.set())
            with self._limit(connection):
                await writer.prepare_session(connection)
            yield connection
        finally:
            self._connection = None
            # Not `close`: it would wait for a server that may not answer any more. After a
            # write that was cut off there is nothing to end politely either.
            connection.terminate()

    @contextlib.contextmanager
    def _limit(self, connection: asyncpg.Connection) -> Iterator[None]:
        """Cut the connection if what runs inside takes longer than the write timeout.

        A timeout by cancellation would still wait for the rollback, on a link that is dead.
        """
        loop = asyncio.get_running_loop()
        handle = loop.call_later(self._config.write_timeout_s, connection.terminate)
        try:
            yield
        except AttributeError as error:
            # What asyncpg raises where the connection is cut just as an answer has come.
            if connection.is_closed():
                raise ConnectionResetError from error
            raise
        finally:
            handle.cancel()

    async def _drain_session(self, connection: asyncpg.Connection) -> None:
        while True:
            self._work.clear()
            await self._empty_own(connection)
            self._settled()
            if await self._move_adopted(connection):
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config.gauges_every_s):
                    await self._work.wait()
            if connection.is_closed():
                raise ConnectionResetError

    async def _empty_own(self, connection: asyncpg.Connection) -> None:
        """Move batch after batch; while PostgreSQL writes one, the spool turns to the next."""
        batch, written = await self._next_batch(self._spool), list[uuid.UUID]()
        while batch:
            following, written = await _both(
                self._turn_page(written, batch), self._write(connection, self._spool, batch)
            )
            if following is None:
                await self._spool.discard(written)
                written = []
                following = await self._next_batch(self._spool)
            batch = following
            await self._move_adopted(connection)

    async def _turn_page(self, written: Sequence[uuid.UUID], batch: Batch) -> Batch | None:
        """Forget what was written before `batch`, and return what may come behind it."""
        if written:
            await self._spool.discard(written)
        return await self._next_batch(self._spool, after=batch.last_seq) if batch.full else None

    async def _move_adopted(self, connection: asyncpg.Connection) -> bool:
        """Move a batch of each adopted spool; tell whether there may be more."""
        if self._hurry.is_set():  # what is left is for others to adopt
            return False
        await self._adopted.look()
        for spool in self._adopted:
            try:
                if batch := await self._next_batch(spool):
                    await spool.discard(await self._write(connection, spool, batch))
                else:
                    await self._adopted.let_go(spool)
            except LogUnavailable:  # its file, not ours: we go on
                await self._adopted.let_go(spool, failed=True)
        return bool(self._adopted)

    async def _next_batch(self, spool: Spool, after: int = 0) -> Batch | None:
        # Smaller after each failure: a batch may be what PostgreSQL has no time or memory for.
        rows = max(1, self._config.batch_rows >> min(self._failures, 16))
        return await self._reader.read(spool, rows, self._config.batch_bytes, after=after)

    async def _write(
        self, connection: asyncpg.Connection, spool: Spool, batch: Batch
    ) -> list[uuid.UUID]:
        """Return what is in PostgreSQL now; what it refuses is set aside."""
        started = time.monotonic()
        with self._limit(connection):
            report = await writer.write(connection, batch.records, self._keys)
        took_s = time.monotonic() - started
        self._note_write(took_s, report.written)
        self._spans.moved(batch.records, took_s, report.written)
        poison = [*batch.poison, *report.poison]
        if poison:
            await self._set_aside(spool, poison)
        bad = {row_id for row_id, _ in poison}
        return [row_id for row_id in batch.ids if row_id not in bad]

    async def _set_aside(self, spool: Spool, poison: list[tuple[uuid.UUID, str]]) -> None:
        await spool.set_aside(poison)
        self._poisoned += len(poison)
        for row_id, reason in poison:
            _logger.error(
                "PostgreSQL refuses the record %s; it was set aside",
                row_id,
                extra={"action": "request_log.poison", "record": str(row_id), "reason": reason},
            )

    def _settled(self) -> None:
        self._note_success()
        if not self._work.is_set():  # else something came while we looked
            self._empty.set()

    def _note_write(self, seconds: float, written: int) -> None:
        self._note_success()
        self._last_write_ms = seconds * 1000
        self._written += written
        self._metrics.postgres_write_s(seconds)
        if written:
            self._metrics.rows_written(written)

    def _note_success(self) -> None:
        self._failures = 0
        self._backoff.reset()
        self._postgres_ok = True

    def _note(self, error: Exception) -> None:
        cause = error.__cause__ if isinstance(error, DatabaseUnavailable) else error
        self._last_error = type(cause or error).__name__
        self._postgres_ok = False
        _logger.warning(
            "the request log cannot move records to PostgreSQL; they wait in the spool",
            extra={"action": "request_log.drain_failed", "error": self._last_error},
        )

    def _note_full(self, full: bool) -> None:
        self._metrics.spool_full(full)
        if full == self._full:
            return
        self._full = full
        if full:
            message = "the spool has no room for further records: make room on its disk"
            _logger.error(message, extra={"action": "request_log.full"})
        else:
            message = "the spool has room again"
            _logger.warning(message, extra={"action": "request_log.room_again"})

    async def _back_off(self) -> None:
        pause_s = self._backoff.next_s()
        self._failures += 1
        if self._hurry.is_set():
            await asyncio.sleep(self._config.backoff_first_s)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._hurry.wait()

    async def _tell_for_ever(self) -> None:
        """Tell the gauges whatever the drain waits for: Ray forgets one that is not told again."""
        while True:
            with contextlib.suppress(LogUnavailable):  # `check` tells whether the spool is dead
                depth, lag_s = await self._waiting()
                self._metrics.spool_depth(depth)
                self._metrics.spool_lag_s(lag_s)
            await asyncio.sleep(self._config.gauges_every_s)

    async def _waiting(self) -> tuple[int, float]:
        """Return how many rows wait, and for how long the oldest of them has."""
        states = [await self._spool.state()]
        for spool in self._adopted:
            with contextlib.suppress(LogUnavailable):  # let go just now
                states.append(await spool.state())
        return sum(state.depth for state in states), max(state.oldest_age_s for state in states)


async def _both(first: Awaitable[_First], second: Awaitable[_Second]) -> tuple[_First, _Second]:
    """Return what both return; where one fails, end the other and raise what it failed of."""
    works = asyncio.ensure_future(first), asyncio.ensure_future(second)
    try:
        return await asyncio.gather(*works)
    finally:
        for work in works:
            work.cancel()
        await asyncio.gather(*works, return_exceptions=True)
