"""The spool: records on this machine's disk until PostgreSQL has them.

SQLite in WAL mode with synchronous=FULL, owned by one thread. The thread takes everything
that waits and commits it at once, so that one fsync serves all appends that came during
the previous one: group commit without a timer. Exactly one process holds a spool.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import queue
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from serve_app.errors import ConfigError, LogUnavailable
from serve_app.files import sync_folder
from serve_app.records import RequestRecord

FILE_NAME = "spool.sqlite3"
LOCK_NAME = "spool.lock"
_LOCK_POLL_S = 0.1  # flock has no wait with a limit
_GROUP_LIMIT = 1024
_MIB = 1024 * 1024
# Once the spool has been emptied, so many free pages go back to the file system at a time:
# not all of them, as appends wait meanwhile.
_SHRINK_PAGES = 1024

_SCHEMA = """
create table if not exists spool (
    seq         integer primary key autoincrement,
    id          blob    not null unique,
    spooled_at  real    not null,
    data        blob    not null
);
create table if not exists poison (
    seq           integer primary key autoincrement,
    id            blob    not null unique,
    set_aside_at  real    not null,
    reason        text    not null,
    data          blob    not null
);
"""
_INSERT = "insert into spool (id, spooled_at, data) values (?, ?, ?) on conflict (id) do nothing"
_BATCH = "select id, data from spool order by seq limit ?"
_DELETE = "delete from spool where id = ?"
_STATE = """
select (select count(*) from spool),
       (select spooled_at from spool order by seq limit 1),
       (select count(*) from poison)
"""
_SET_ASIDE = """
insert into poison (id, set_aside_at, reason, data)
select id, ?, ?, data from spool where id = ? on conflict (id) do nothing
"""
_RESTORE = """
insert into spool (id, spooled_at, data)
select id, ?, data from poison order by seq on conflict (id) do nothing
"""

_T = TypeVar("_T")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpooledRow:
    """One row of the spool; `data` is the JSON of its record."""

    id: uuid.UUID
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SpoolState:
    """How full a spool is; `oldest_age_s` is 0 where it is empty."""

    depth: int
    oldest_age_s: float
    poison: int


@dataclass(frozen=True, slots=True)
class _Job(Generic[_T]):
    work: Callable[[sqlite3.Connection], _T]
    result: asyncio.Future[_T]
    loop: asyncio.AbstractEventLoop


class Spool:
    """A queue of records on disk. Use it from one event loop, between `open` and `close`."""

    def __init__(
        self,
        folder: Path,
        *,
        lock_timeout_s: float = 30.0,
        max_bytes: int | None = None,
    ) -> None:
        self._folder = folder
        self._lock_timeout_s = lock_timeout_s
        self._max_bytes = max_bytes
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._emptied = False  # set on the loop, taken by the thread
        self._thread: threading.Thread | None = None
        self._lock: int | None = None
        self._closed = True

    @property
    def path(self) -> Path:
        """The database file."""
        return self._folder / FILE_NAME

    @property
    def alive(self) -> bool:
        """Tell whether the spool takes records."""
        return not self._closed and self._thread is not None and self._thread.is_alive()

    async def open(self) -> None:
        """Take the lock, waiting up to `lock_timeout_s` for its holder, and open the file.

        Raises:
            ConfigError: the folder cannot be written, another process keeps the lock,
                or the file is not a spool that can be read.
        """
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            await self._take_lock()
            connection = await asyncio.to_thread(_connect, self.path, self._max_bytes)
        except (OSError, sqlite3.Error) as error:
            self._release_lock()
            allowed = f"a folder with a spool that can be written ({type(error).__name__})"
            raise ConfigError("the spool folder", str(self._folder), allowed) from error
        self._closed = False
        self._thread = threading.Thread(
            target=self._serve, args=(connection,), name="comp-ai-spool", daemon=True
        )
        self._thread.start()

    async def close(self) -> None:
        """Finish what was handed over, close the file and give the lock back."""
        if self._thread is not None:
            self._closed = True
            self._jobs.put(None)
            await asyncio.to_thread(self._thread.join)
            self._thread = None
        self._release_lock()

    async def append(self, record: RequestRecord) -> None:
        """Return once `record` is on disk; a repeated id changes nothing.

        A record handed over is written even if the task that waits here is cancelled.

        Raises:
            LogUnavailable: this record is not known to be on disk (disk full, I/O error, or
                the spool is closed). Other appends are not affected.
        """
        row = (record.id.bytes, time.time(), _encode(record))
        await self._do(lambda connection: connection.execute(_INSERT, row).rowcount)

    async def batch(self, limit: int, *, max_bytes: int = 16 * _MIB) -> list[SpooledRow]:
        """Return the oldest rows: at most `limit`, and once past `max_bytes` no more."""
        rows = await self._do(lambda connection: _read_batch(connection, limit, max_bytes))
        self._emptied = not rows
        return rows

    async def discard(self, ids: Iterable[uuid.UUID]) -> None:
        """Forget the rows with these ids; they are safe elsewhere."""
        keys = [(row_id.bytes,) for row_id in ids]
        await self._do(lambda connection: connection.executemany(_DELETE, keys).rowcount)

    async def set_aside(self, reasons: Iterable[tuple[uuid.UUID, str]]) -> None:
        """Move rows to the poison table, so that they stay and the others go on.

        A reason must not quote the record.
        """
        now = time.time()
        rows = [(now, reason, row_id.bytes) for row_id, reason in reasons]
        await self._do(lambda connection: _set_aside(connection, rows))

    async def poisoned(self, limit: int = 100) -> list[tuple[uuid.UUID, str]]:
        """Return ids and reasons of rows that were set aside, oldest first."""
        select = "select id, reason from poison order by seq limit ?"
        found = await self._do(lambda connection: connection.execute(select, (limit,)).fetchall())
        return [(uuid.UUID(bytes=row_id), reason) for row_id, reason in found]

    async def restore_poison(self) -> int:
        """Put the rows that were set aside back into the queue; return how many."""
        return await self._do(_restore_poison)

    async def state(self) -> SpoolState:
        """Return how full the spool is."""
        depth, oldest, poison = await self._do(lambda con: con.execute(_STATE).fetchone())
        age = 0.0 if oldest is None else max(0.0, time.time() - oldest)
        return SpoolState(depth=depth, oldest_age_s=age, poison=poison)

    async def depth(self) -> int:
        """Return how many rows wait."""
        return (await self.state()).depth

    async def oldest_age_s(self) -> float:
        """Return for how long the oldest row has waited, in seconds."""
        return (await self.state()).oldest_age_s

    async def _do(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        if not self.alive:
            raise LogUnavailable
        loop = asyncio.get_running_loop()
        job: _Job[_T] = _Job(work, loop.create_future(), loop)
        self._jobs.put(job)
        return await job.result

    async def _take_lock(self) -> None:
        descriptor = os.open(self._folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
        deadline = time.monotonic() + self._lock_timeout_s
        try:
            while not _try_lock(descriptor):
                if time.monotonic() >= deadline:
                    raise ConfigError(
                        "the spool folder",
                        str(self._folder),
                        f"one that no other process holds (waited {self._lock_timeout_s:g} s)",
                    )
                await asyncio.sleep(_LOCK_POLL_S)
        except BaseException:
            os.close(descriptor)
            raise
        self._lock = descriptor

    def _release_lock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)  # the kernel does the same when the process dies
            self._lock = None

    # From here on: the spool's thread.

    def _serve(self, connection: sqlite3.Connection) -> None:
        try:
            while (group := self._take()) is not None:
                try:
                    connection = self._commit(connection, group)
                except BaseException:  # a bug: nobody may wait for ever, and the owner sees it
                    _fail(group)
                    raise
                if self._emptied:
                    self._emptied = False
                    _shrink(connection)
        finally:
            connection.close()
            self._closed = True
            self._fail_queued()

    def _take(self) -> list[_Job[Any]] | None:
        """Wait for a job, and take all that wait behind it; None ends the thread."""
        first = self._jobs.get()
        if first is None:
            return None
        group = [first]
        while len(group) < _GROUP_LIMIT:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is None:
                self._jobs.put(None)  # after this group; nothing is accepted any more
                break
            group.append(job)
        return group

    def _commit(self, connection: sqlite3.Connection, group: list[_Job[Any]]) -> sqlite3.Connection:
        """Do `group` in one transaction; where that fails, in halves, down to the guilty job."""
        try:
            results = _transact(connection, group)
        except sqlite3.Error as error:
            connection = self._recover(connection, error)
            if len(group) == 1:
                _refuse(group[0], error)
                return connection
            half = len(group) // 2
            connection = self._commit(connection, group[:half])
            return self._commit(connection, group[half:])
        _resolve(group, results)
        return connection

    def _recover(self, connection: sqlite3.Connection, error: sqlite3.Error) -> sqlite3.Connection:
        if connection.in_transaction:
            connection.rollback()
        if getattr(error, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_IOERR:
            return connection
        # After an I/O error what the connection keeps in memory may differ from the disk.
        try:
            fresh = _connect(self.path, self._max_bytes)
        except (OSError, sqlite3.Error):
            return connection  # the next job fails, or does not
        connection.close()
        return fresh

    def _fail_queued(self) -> None:
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return
            if job is not None:
                _fail([job])


def _connect(path: Path, max_bytes: int | None) -> sqlite3.Connection:
    # SQLite gives its -wal and -shm files the mode of this one.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    path.chmod(0o600)
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        # Before the first table: it cannot be switched on later.
        connection.execute("pragma auto_vacuum = incremental")
        connection.execute("pragma journal_mode = wal")
        connection.execute("pragma synchronous = full")
        # Overwrites deleted prompts where that costs no further write.
        connection.execute("pragma secure_delete = fast")
        connection.execute(f"pragma journal_size_limit = {64 * _MIB}")
        connection.executescript(_SCHEMA)
        if max_bytes is not None:
            page_size: int = connection.execute("pragma page_size").fetchone()[0]
            connection.execute(f"pragma max_page_count = {max(1, max_bytes // page_size)}")
        sync_folder(path.parent)
    except BaseException:
        connection.close()
        raise
    return connection


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _encode(record: RequestRecord) -> bytes:
    try:
        return record.to_json()
    except TypeError:
        pass  # a lone surrogate, which JSON lets a client write and UTF-8 cannot hold
    texts: dict[str, Any] = {
        field.name: value.encode("utf-8", "replace").decode("utf-8")
        for field in fields(record)
        if type(value := getattr(record, field.name)) is str
    }
    try:
        return replace(record, **texts).to_json()
    except TypeError as error:
        raise LogUnavailable from error


def _transact(connection: sqlite3.Connection, group: Sequence[_Job[Any]]) -> list[Any]:
    connection.execute("begin immediate")
    results = [job.work(connection) for job in group]
    connection.execute("commit")
    return results


def _read_batch(connection: sqlite3.Connection, limit: int, max_bytes: int) -> list[SpooledRow]:
    rows: list[SpooledRow] = []
    size = 0
    cursor = connection.execute(_BATCH, (limit,))
    for row_id, data in cursor:
        rows.append(SpooledRow(id=uuid.UUID(bytes=row_id), data=data))
        size += len(data)
        if size >= max_bytes:
            break
    cursor.close()
    return rows


def _shrink(connection: sqlite3.Connection) -> None:
    with contextlib.suppress(sqlite3.Error):  # no harm done: the pages stay free
        free: int = connection.execute("pragma freelist_count").fetchone()[0]
        if free >= _SHRINK_PAGES:
            # A script, since `execute` runs one step of this pragma, and so frees one page.
            connection.executescript(f"pragma incremental_vacuum({_SHRINK_PAGES})")


def _set_aside(connection: sqlite3.Connection, rows: list[tuple[float, str, bytes]]) -> None:
    connection.executemany(_SET_ASIDE, rows)
    connection.executemany(_DELETE, [(row_id,) for _, _, row_id in rows])


def _restore_poison(connection: sqlite3.Connection) -> int:
    connection.execute(_RESTORE, (time.time(),))
    return connection.execute("delete from poison").rowcount


def _resolve(group: Sequence[_Job[Any]], results: Sequence[Any]) -> None:
    pairs = list(zip(group, results, strict=True))

    def settle() -> None:
        for job, result in pairs:
            if not job.result.done():  # cancelled, and written all the same
                job.result.set_result(result)

    _call(group[0].loop, settle)


def _refuse(job: _Job[Any], error: sqlite3.Error | None) -> None:
    if error is not None:
        _logger.error(
            "the spool could not write",
            extra={
                "action": "spool.write_failed",
                "error": getattr(error, "sqlite_errorname", type(error).__name__),
            },
        )
    refusal = LogUnavailable()
    refusal.__cause__ = error

    def settle() -> None:
        if not job.result.done():
            job.result.set_exception(refusal)

    _call(job.loop, settle)


def _fail(group: Iterable[_Job[Any]]) -> None:
    # Runs behind the answers already on their way, so it touches only those without one.
    for job in group:
        _refuse(job, None)


def _call(loop: asyncio.AbstractEventLoop, settle: Callable[[], None]) -> None:
    try:
        loop.call_soon_threadsafe(settle)
    except RuntimeError:
        _logger.warning(
            "the event loop ended before its records were acknowledged",
            extra={"action": "spool.loop_closed"},
        )
