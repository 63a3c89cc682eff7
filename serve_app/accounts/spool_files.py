"""The spools on this machine's disk, seen from another process than the one that holds them.

SQLite lets several processes at one file: reading disturbs nobody, and what is changed here is
one short transaction, beside the holder's own.
"""

from __future__ import annotations

import sqlite3
import time
import uuid
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from serve_app.accounts.spool import STATE, Spool
from serve_app.accounts.spool_folders import spool_folders
from serve_app.errors import CompAIError
from serve_app.file_lock import FileLock

_POISON = "select id, set_aside_at, reason from poison order by seq"
_RESTORE = """
insert into spool (id, spooled_at, data)
select id, ?, data from poison where id = ? on conflict (id) do nothing
"""
_DROP = "delete from poison where id = ?"


class SpoolUnreadable(CompAIError):
    """A spool cannot be read or changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpoolReport:
    """How one spool is. `error` names why it cannot be read; then its counts are 0."""

    folder: Path
    held: bool
    bytes: int
    depth: int = 0
    oldest_age_s: float = 0.0
    poison: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PoisonRow:
    """A record that PostgreSQL refused, and why. `set_aside_at` is in s since 1970."""

    folder: Path
    id: uuid.UUID
    set_aside_at: float
    reason: str


def read_reports(root: Path) -> list[SpoolReport]:
    """Return how the spools below `root` are."""
    return [_report(folder) for folder in spool_folders(root)]


def read_poison(root: Path, ids: Collection[uuid.UUID] = ()) -> list[PoisonRow]:
    """Return the rows that were set aside: all of them, or those with `ids`.

    Raises:
        SpoolUnreadable: names the folder.
    """
    rows = [row for folder in spool_folders(root) for row in _poison(folder)]
    return [row for row in rows if not ids or row.id in ids]


def restore(rows: Sequence[PoisonRow]) -> int:
    """Put `rows` back into the queues of their spools; return how many were still there."""
    now = time.time()
    return sum(_move(folder, ids, now) for folder, ids in _by_folder(rows))


def drop(rows: Sequence[PoisonRow]) -> int:
    """Delete `rows` for good; return how many were still there."""
    return sum(_delete(folder, ids) for folder, ids in _by_folder(rows))


def _report(folder: Path) -> SpoolReport:
    size = sum(file.stat().st_size for file in folder.glob(f"{Spool.FILE}*"))
    held = _is_held(folder)
    try:
        with _opened(folder, "ro") as connection:
            depth, oldest, poison = connection.execute(STATE).fetchone()
    except SpoolUnreadable as error:
        return SpoolReport(folder=folder, held=held, bytes=size, error=error.message)
    age_s = 0.0 if oldest is None else max(0.0, time.time() - oldest)
    return SpoolReport(
        folder=folder, held=held, bytes=size, depth=depth, oldest_age_s=age_s, poison=poison
    )


def _is_held(folder: Path) -> bool:
    try:
        return FileLock(folder / Spool.LOCK).held_elsewhere()
    except OSError:
        return False


def _poison(folder: Path) -> list[PoisonRow]:
    with _opened(folder, "ro") as connection:
        found = connection.execute(_POISON).fetchall()
    return [
        PoisonRow(folder=folder, id=uuid.UUID(bytes=row_id), set_aside_at=at, reason=reason)
        for row_id, at, reason in found
    ]


def _move(folder: Path, ids: Sequence[uuid.UUID], now: float) -> int:
    with _opened(folder, "rw") as connection:
        connection.executemany(_RESTORE, [(now, row_id.bytes) for row_id in ids])
        return _forget(connection, ids)


def _delete(folder: Path, ids: Sequence[uuid.UUID]) -> int:
    with _opened(folder, "rw") as connection:
        return _forget(connection, ids)


def _forget(connection: sqlite3.Connection, ids: Sequence[uuid.UUID]) -> int:
    return connection.executemany(_DROP, [(row_id.bytes,) for row_id in ids]).rowcount


@contextmanager
def _opened(folder: Path, mode: str) -> Iterator[sqlite3.Connection]:
    """Lend a connection; what is done to it is one transaction."""
    address = f"file:{quote(str(folder / Spool.FILE))}?mode={mode}"
    try:
        with closing(sqlite3.connect(address, uri=True)) as connection:
            connection.execute("pragma secure_delete = fast")
            with connection:
                yield connection
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", type(error).__name__)
        raise SpoolUnreadable(f"The spool {folder} cannot be opened: {name}.") from error


def _by_folder(rows: Sequence[PoisonRow]) -> Iterator[tuple[Path, list[uuid.UUID]]]:
    for folder in dict.fromkeys(row.folder for row in rows):
        yield folder, [row.id for row in rows if row.folder == folder]
