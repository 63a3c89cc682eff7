"""The key ring: the wrapped keys of the subjects, and what was erased, beside the dumps.

A dump holds what the subjects' keys seal, and no key. The keys stand in one file, of which only
the newest generation is kept: an old dump is opened with the keys of today, so what was erased
since it was taken stays unreadable. The keys in it are sealed with the master key, which is in no
backup.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import asyncpg
import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serve_app.backup.contents import query
from serve_app.backup.errors import BackupDamaged, BackupError
from serve_app.files import sync_folder, write_whole
from serve_app.records import utc_now

_Tables = dict[str, list[dict[str, Any]]]
_CHUNK_BYTES = 1024 * 1024


class KeyRing(BaseModel):
    """One generation of the ring: all rows of the tables of comp_ai_keys."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: Literal[1] = 1
    installation: uuid.UUID
    written_at: datetime
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    tables: _Tables

    @property
    def rows(self) -> dict[str, int]:
        """Number of rows by table."""
        return {name: len(rows) for name, rows in self.tables.items()}


async def read_ring(connection: asyncpg.Connection) -> KeyRing:
    """Return the ring as the database has it now, all of one snapshot."""
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        written_at = utc_now()
        installation = await connection.fetchval(query("installation"))
        tables: _Tables = {}
        for row in await connection.fetch(query("tables"), "comp_ai_keys"):
            text = await connection.fetchval(query("keys_of").format(table=row["name"]))
            tables[row["name"]] = orjson.loads(text)
    return KeyRing(
        installation=installation, written_at=written_at, sha256=_digest(tables), tables=tables
    )


async def put_ring(connection: asyncpg.Connection, ring: KeyRing) -> None:
    """Put the ring into the tables of comp_ai_keys in the place of what they hold.

    Raises:
        BackupError: the ring is of a newer schema than this database.
    """
    async with connection.transaction():
        for table, rows in ring.tables.items():
            await _put_table(connection, table, rows)


async def _put_table(
    connection: asyncpg.Connection, table: str, rows: list[dict[str, Any]]
) -> None:
    known = {row["name"] for row in await connection.fetch(query("columns_of_keys"), table)}
    columns = list(rows[0]) if rows else []
    if not known or not known.issuperset(columns):
        raise BackupError(
            f"The key ring has {table} in a form that this release does not know. "
            "Restore with the release that wrote it."
        )
    await connection.execute(f"delete from comp_ai_keys.{table}")  # noqa: S608  a table's name
    if rows:
        statement = query("put_keys").format(table=table, columns=", ".join(columns))
        await connection.execute(statement, orjson.dumps(rows).decode())


@dataclass(frozen=True, slots=True)
class KeyRingFile:
    """The file `keyring` of a folder of backups."""

    folder: Path

    @property
    def path(self) -> Path:
        """The file of the newest generation."""
        return self.folder / "keyring"

    def read(self) -> KeyRing | None:
        """Return the ring, or None where there is none.

        Raises:
            BackupDamaged: the file is damaged.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            ring = KeyRing.model_validate_json(data)
        except ValidationError:
            raise BackupDamaged(f"The key ring {self.path} is damaged.") from None
        if _digest(ring.tables) != ring.sha256:
            raise BackupDamaged(f"The key ring {self.path} was changed.")
        return ring

    async def rewrite(self, connection: asyncpg.Connection) -> KeyRing:
        """Write the ring as the database has it now, and destroy the generation before.

        To be done after an erasure too: until then the file holds the key that was destroyed.

        Raises:
            BackupError: the file is of another installation; it is left as it is.
            BackupDamaged: the file cannot be read, so whose it is cannot be told.
        """
        async with self._locked():
            ring = await read_ring(connection)
            self.check_owner(ring.installation)
            await asyncio.to_thread(self._replace, ring)
        return ring

    def check_owner(self, installation: uuid.UUID) -> None:
        """Return where the file may be rewritten for `installation`.

        Raises:
            BackupError: it is of another installation.
            BackupDamaged: it cannot be read.
        """
        old = self.read()
        if old is not None and old.installation != installation:
            raise BackupError(
                f"{self.path} has the keys of installation {old.installation}, and this database "
                f"is installation {installation}. Without those keys its backups cannot be read. "
                "Restore one of them, or set COMP_AI_BACKUP_PATH to another folder."
            )

    @asynccontextmanager
    async def _locked(self) -> AsyncIterator[None]:
        # From the reading of the rows to the renaming: a generation never replaces a newer one.
        with (self.folder / ".keyring.lock").open("a") as file:
            await asyncio.to_thread(fcntl.flock, file, fcntl.LOCK_EX)
            yield

    def _replace(self, ring: KeyRing) -> None:
        """There is a whole ring at every moment, and the old one has a name until it is gone."""
        before = self.folder / "keyring.before"
        _destroy(before)  # a run that was killed left it
        if self.path.exists():
            before.hardlink_to(self.path)
        write_whole(self.path, ring.model_dump_json().encode())
        _destroy(before)


def _destroy(file: Path) -> None:
    """Overwrite a file and remove it.

    On a disk that writes elsewhere what is overwritten (SSDs, copy-on-write, snapshots) the old
    content may stay; docs/operations.md says what to do there.
    """
    try:
        descriptor = os.open(file, os.O_WRONLY)
    except FileNotFoundError:
        return
    with os.fdopen(descriptor, "wb") as opened:
        left = os.fstat(descriptor).st_size
        while left > 0:
            left -= opened.write(bytes(min(left, _CHUNK_BYTES)))
        opened.flush()
        os.fsync(descriptor)
    file.unlink()
    sync_folder(file.parent)


def _digest(tables: _Tables) -> str:
    return hashlib.sha256(orjson.dumps(tables, option=orjson.OPT_SORT_KEYS)).hexdigest()
