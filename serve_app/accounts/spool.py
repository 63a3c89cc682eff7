"""The spool: records on this machine's disk until PostgreSQL has them.

SQLite in WAL mode with synchronous=FULL, so that a record which was acknowledged outlives a power
cut; committed in groups, so that one fsync serves all appends that came during the previous one.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from serve_app.accounts.spooled import SpooledForm
from serve_app.errors import LogUnavailable
from serve_app.group_commit import GroupCommit
from serve_app.records import RequestRecord

_MIB = 1024 * 1024
# Once the spool has been emptied, so many free pages go back to the file system at a time:
# not all of them, as appends wait meanwhile.
_SHRINK_PAGES = 1024
# Of `max_bytes`; the rest is for the records of requests that are under way.
_ADMIT_SHARE = 0.9

_PRAGMAS = (
    # Before the first table: it cannot be switched on later.
    "auto_vacuum = incremental",
    "journal_mode = wal",
    "synchronous = full",
    # Overwrites deleted prompts where that costs no further write.
    "secure_delete = fast",
)
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
_BATCH = "select seq, id, data from spool where seq > ? order by seq limit ?"
_DELETE = "delete from spool where id = ?"
STATE = """
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


@dataclass(frozen=True, slots=True, kw_only=True)
class SpooledRow:
    """One row of the spool; `data` is its record, as `SpooledForm` writes it."""

    seq: int
    id: uuid.UUID
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SpoolState:
    """How full a spool is; `oldest_age_s` is 0 where it is empty."""

    depth: int
    oldest_age_s: float
    poison: int


class Spool(GroupCommit):
    """A queue of records on disk. Use it from one event loop, between `open` and `close`.

    Args:
        folder: where it lies; made where it is not there.
        lock_timeout_s: longest wait for another process to let go of it.
        max_bytes: largest file; no limit where None.
        min_free_bytes: free bytes of the disk below which it says that it has no room.
    """

    FILE: ClassVar[str] = "spool.sqlite3"
    LOCK: ClassVar[str] = "spool.lock"

    def __init__(
        self,
        folder: Path,
        *,
        form: SpooledForm,
        lock_timeout_s: float = 30.0,
        max_bytes: int | None = None,
        min_free_bytes: int = 0,
    ) -> None:
        super().__init__(
            folder,
            name="spool",
            schema=_SCHEMA,
            pragmas=_PRAGMAS,
            unavailable=LogUnavailable,
            lock_timeout_s=lock_timeout_s,
            max_bytes=max_bytes,
        )
        self.form = form
        self._emptied = False  # set on the loop, taken by the thread
        self._admit_bytes = None if max_bytes is None else int(max_bytes * _ADMIT_SHARE)
        self._min_free_bytes = min_free_bytes
        self._refused = False  # the last append was

    async def append(self, record: RequestRecord) -> None:
        """Return once `record` is on disk; a repeated id changes nothing.

        A record handed over is written even if the task that waits here is cancelled.

        Raises:
            LogUnavailable: this record is not known to be on disk (disk full, I/O error, the
                spool is closed, or there is no key to seal it). Other appends are not affected.
        """
        row = (record.id.bytes, time.time(), self.form.write(record))
        try:
            await self._do(lambda connection: connection.execute(_INSERT, row).rowcount)
        except LogUnavailable:
            self._refused = True
            raise
        self._refused = False

    async def has_room(self) -> bool:
        """Tell whether new requests may count on room for their records.

        It says no some way before it is full, so that requests under way still find room. Once
        it has refused a record, it writes to the disk to see whether that is over.

        Raises:
            LogUnavailable: nothing can be written.
        """
        if self._refused:
            await self._do(_write_something)
            self._refused = False
        return await self._do(self._measure)

    async def batch(
        self, limit: int, *, max_bytes: int = 16 * _MIB, after: int = 0
    ) -> list[SpooledRow]:
        """Return the oldest rows: at most `limit`, and once past `max_bytes` no more.

        `after` is the `seq` of a row behind which they begin.
        """
        rows = await self._do(lambda connection: _read_batch(connection, after, limit, max_bytes))
        if not after:
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
        depth, oldest, poison = await self._do(lambda con: con.execute(STATE).fetchone())
        age = 0.0 if oldest is None else max(0.0, time.time() - oldest)
        return SpoolState(depth=depth, oldest_age_s=age, poison=poison)

    async def depth(self) -> int:
        """Return how many rows wait."""
        return (await self.state()).depth

    async def oldest_age_s(self) -> float:
        """Return for how long the oldest row has waited, in seconds."""
        return (await self.state()).oldest_age_s

    def _measure(self, connection: sqlite3.Connection) -> bool:
        if self._admit_bytes is not None and _used_bytes(connection) >= self._admit_bytes:
            return False
        disk = os.statvfs(self._folder)
        return disk.f_bavail * disk.f_frsize >= self._min_free_bytes

    def _after_commit(self, connection: sqlite3.Connection) -> None:
        if self._emptied:
            self._emptied = False
            _shrink(connection)


def _read_batch(
    connection: sqlite3.Connection, after: int, limit: int, max_bytes: int
) -> list[SpooledRow]:
    rows: list[SpooledRow] = []
    size = 0
    cursor = connection.execute(_BATCH, (after, limit))
    for seq, row_id, data in cursor:
        rows.append(SpooledRow(seq=seq, id=uuid.UUID(bytes=row_id), data=data))
        size += len(data)
        if size >= max_bytes:
            break
    cursor.close()
    return rows


def _used_bytes(connection: sqlite3.Connection) -> int:
    names = ("page_count", "freelist_count", "page_size")
    pages, free, size = (connection.execute(f"pragma {name}").fetchone()[0] for name in names)
    return int((pages - free) * size)


def _write_something(connection: sqlite3.Connection) -> None:
    # A number in the file's header that SQLite leaves to its users.
    connection.execute(f"pragma user_version = {time.time_ns() % 2**31}")


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
