"""An SQLite file that one thread owns and that commits in groups.

The thread takes everything that waits and commits it at once, so that one commit serves all jobs
that came during the previous one: group commit without a timer. Exactly one process holds a file.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from serve_app.errors import ConfigError, RequestError
from serve_app.file_lock import FileLock
from serve_app.files import sync_folder

_LOCK_POLL_S = 0.1  # flock has no wait with a limit
_GROUP_LIMIT = 1024
_MIB = 1024 * 1024

_T = TypeVar("_T")
_logger = logging.getLogger(__name__)


class FileHeld(ConfigError):
    """Another process holds the file."""


class FileDamaged(ConfigError):
    """The file is no database, or one that SQLite cannot read."""


@dataclass(frozen=True, slots=True)
class _Job(Generic[_T]):
    work: Callable[[sqlite3.Connection], _T]
    result: asyncio.Future[_T]
    loop: asyncio.AbstractEventLoop


class GroupCommit:
    """One file and its thread. Use it from one event loop, between `open` and `close`.

    Args:
        folder: where the file and its lock lie; made where it is not there.
        name: of the file, of its lock and of the thread.
        schema: SQL that makes the tables; runs at every opening.
        pragmas: run on each connection before the schema.
        unavailable: what a job raises that is not known to be done.
        lock_timeout_s: longest wait for another process to let go of the file.
        max_bytes: largest file; no limit where None.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        schema: str,
        pragmas: Sequence[str],
        unavailable: type[RequestError],
        lock_timeout_s: float = 30.0,
        max_bytes: int | None = None,
    ) -> None:
        self._folder = folder
        self._name = name
        self._schema = schema
        self._pragmas = (*pragmas, f"journal_size_limit = {64 * _MIB}")
        self._unavailable = unavailable
        self._lock_timeout_s = lock_timeout_s
        self._max_bytes = max_bytes
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = FileLock(folder / f"{name}.lock")
        # Held by who waits for the first one.
        self._next = FileLock(folder / f"{name}.next")
        self._closed = True

    @property
    def folder(self) -> Path:
        """Where the file lies."""
        return self._folder

    @property
    def path(self) -> Path:
        """The database file."""
        return self._folder / f"{self._name}.sqlite3"

    @property
    def alive(self) -> bool:
        """Tell whether the file takes jobs."""
        return not self._closed and self._thread is not None and self._thread.is_alive()

    @property
    def wanted(self) -> bool:
        """Whether another process waits for the file. Raises OSError."""
        return self._next.held_elsewhere()

    async def open(self) -> None:
        """Take the lock, waiting up to `lock_timeout_s` for its holder, and open the file.

        Raises:
            FileHeld: another process keeps the lock.
            FileDamaged: the file is none of this kind that can be read.
            ConfigError: the folder cannot be written.
        """
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            await self._take_lock()
            connection = await asyncio.to_thread(self._connect)
        except (OSError, sqlite3.Error) as error:
            self._lock.give_back()
            allowed = f"a folder with a {self._name} that can be written ({type(error).__name__})"
            kind = FileDamaged if _is_damage(error) else ConfigError
            raise kind(f"the {self._name} folder", str(self._folder), allowed) from error
        except asyncio.CancelledError:
            self._lock.give_back()
            raise
        self._closed = False
        self._thread = threading.Thread(
            target=self._serve, args=(connection,), name=f"comp-ai-{self._name}", daemon=True
        )
        self._thread.start()

    async def close(self) -> None:
        """Finish what was handed over, close the file and give the lock back."""
        if self._thread is not None:
            self._closed = True
            self._jobs.put(None)
            await asyncio.to_thread(self._thread.join)
            self._thread = None
        self._lock.give_back()

    async def _do(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """Return what `work` returns, once it is committed; done even if cancelled.

        Raises:
            RequestError: the class given to us: it is not known to be done. Other jobs are not
                affected.
        """
        if not self.alive:
            raise self._unavailable
        loop = asyncio.get_running_loop()
        job: _Job[_T] = _Job(work, loop.create_future(), loop)
        self._jobs.put(job)
        return await job.result

    async def _take_lock(self) -> None:
        deadline = time.monotonic() + self._lock_timeout_s
        try:
            while not self._lock.try_take():
                if time.monotonic() >= deadline:
                    raise FileHeld(
                        f"the {self._name} folder",
                        str(self._folder),
                        f"one that no other process holds (waited {self._lock_timeout_s:g} s)",
                    )
                self._next.try_take()
                await asyncio.sleep(_LOCK_POLL_S)
        finally:
            self._next.give_back()

    # From here on: the thread of the file.

    def _serve(self, connection: sqlite3.Connection) -> None:
        try:
            while (group := self._take()) is not None:
                try:
                    connection = self._commit(connection, group)
                except BaseException:  # a bug: nobody may wait for ever, and the owner sees it
                    self._fail(group)
                    raise
                self._after_commit(connection)
        finally:
            connection.close()
            self._closed = True
            self._fail_queued()

    def _after_commit(self, connection: sqlite3.Connection) -> None:
        """Do what must not be part of a transaction; for those below."""

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
                self._refuse(group[0], error)
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
            fresh = self._connect()
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
                self._fail([job])

    def _refuse(self, job: _Job[Any], error: sqlite3.Error | None) -> None:
        if error is not None:
            _logger.error(
                "the %s could not write",
                self._name,
                extra={
                    "action": f"{self._name}.write_failed",
                    "error": getattr(error, "sqlite_errorname", type(error).__name__),
                },
            )
        refusal = self._unavailable()
        refusal.__cause__ = error

        def settle() -> None:
            if not job.result.done():
                job.result.set_exception(refusal)

        _call(job.loop, settle)

    def _fail(self, group: Iterable[_Job[Any]]) -> None:
        # Runs behind the answers already on their way, so it touches only those without one.
        for job in group:
            self._refuse(job, None)

    def _connect(self) -> sqlite3.Connection:
        # SQLite gives its -wal and -shm files the mode of this one.
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        self.path.chmod(0o600)
        connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        try:
            for pragma in self._pragmas:
                connection.execute(f"pragma {pragma}")
            connection.executescript(self._schema)
            if self._max_bytes is not None:
                page_size: int = connection.execute("pragma page_size").fetchone()[0]
                connection.execute(
                    f"pragma max_page_count = {max(1, self._max_bytes // page_size)}"
                )
            sync_folder(self._folder)
        except BaseException:
            connection.close()
            raise
        return connection


def _is_damage(error: Exception) -> bool:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _transact(connection: sqlite3.Connection, group: Sequence[_Job[Any]]) -> list[Any]:
    connection.execute("begin immediate")
    results = [job.work(connection) for job in group]
    connection.execute("commit")
    return results


def _resolve(group: Sequence[_Job[Any]], results: Sequence[Any]) -> None:
    pairs = list(zip(group, results, strict=True))

    def settle() -> None:
        for job, result in pairs:
            if not job.result.done():  # cancelled, and written all the same
                job.result.set_result(result)

    _call(group[0].loop, settle)


def _call(loop: asyncio.AbstractEventLoop, settle: Callable[[], None]) -> None:
    try:
        loop.call_soon_threadsafe(settle)
    except RuntimeError:
        _logger.warning(
            "the event loop ended before its writes were acknowledged",
            extra={"action": "group_commit.loop_closed"},
        )
