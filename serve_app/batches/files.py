"""Files in PostgreSQL, in chunks: never one of them whole in memory.

Each chunk is sealed by itself with the key of the owner, and so is the name of the file.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from serve_app.accounts.sealing.cells import Cell, Row, cell
from serve_app.accounts.sealing.places import chunk_place, filename_place
from serve_app.batches.queries import query
from serve_app.config import FilesConfig
from serve_app.errors import FileQuotaExceeded, NotFound, StoreUnavailable, Unavailable
from serve_app.lazy_pool import Connection, LazyPool
from serve_app.records import new_id
from serve_app.stored.vault import Vault

CHUNK_BYTES = 256 * 1024
BATCH_INPUT = "batch"
BATCH_OUTPUT = "batch_output"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """One row of `comp_ai.files`."""

    id: str
    owner: str
    purpose: str
    filename: str
    bytes: int
    status: str
    created_at: datetime
    expires_at: datetime

    def to_openai(self) -> dict[str, Any]:
        """Return OpenAI's File object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": int(self.created_at.timestamp()),
            "expires_at": int(self.expires_at.timestamp()),
            "filename": self.filename,
            "purpose": self.purpose,
            "status": self.status,
            "status_details": None,
        }


def new_file_id() -> str:
    """Return an id that sorts after those made before."""
    return f"file-{new_id().hex}"


class FileStore:
    """The files of all owners. Every method raises StoreUnavailable without PostgreSQL or a key."""

    def __init__(self, pool: LazyPool, vault: Vault) -> None:
        self._pool = pool
        self._vault = vault

    async def add(
        self,
        owner: str,
        filename: str,
        size_bytes: int,
        chunks: AsyncIterator[bytes],
        config: FilesConfig,
        expires_after_s: int | None = None,
    ) -> StoredFile:
        """Keep an upload; nobody sees it before it is whole. Cancelled, nothing of it stays.

        Raises:
            FileQuotaExceeded: with it the owner would hold more bytes than allowed.
        """
        file_id = new_file_id()
        keep_s = expires_after_s or config.retention_s
        await self._reserve(file_id, owner, filename, size_bytes, keep_s, config)
        try:
            number = 0
            async for chunk in chunks:
                async with self._pool.connection() as connection, connection.transaction():
                    await add_chunk(connection, self._vault, owner, (file_id, number), chunk)
                number += 1
            async with self._pool.connection() as connection:
                row = await connection.fetchrow(query("publish_file"), file_id)
                published = await _files(connection, self._vault, [] if row is None else [row])
        except BaseException:
            # The owner would have to wait for its bytes until the hourly sweep.
            await asyncio.shield(self._discard(file_id))
            raise
        if not published:
            raise StoreUnavailable  # the upload took so long that it was swept away
        return published[0]

    async def find(self, owner: str, file_id: str) -> StoredFile:
        """Return one file. Raises NotFound where the owner has none of that id."""
        async with self._pool.connection() as connection:
            row = await connection.fetchrow(query("find_file"), file_id, owner)
            if row is None:
                raise no_such_file()
            [file] = await _files(connection, self._vault, [row])
        return file

    async def delete(self, owner: str, file_id: str) -> None:
        """Delete one file. Raises NotFound where the owner has none of that id."""
        async with self._pool.connection() as connection:
            if await connection.fetchval(query("delete_file"), file_id, owner) is None:
                raise no_such_file()

    async def list(
        self, owner: str, *, purpose: str | None, after: str | None, limit: int, newest_first: bool
    ) -> list[StoredFile]:
        """Return up to `limit` files that come after the id `after`."""
        name = "list_files_desc" if newest_first else "list_files_asc"
        async with self._pool.connection() as connection:
            rows = await connection.fetch(query(name), owner, purpose, after, limit)
            return await _files(connection, self._vault, rows)

    async def read(self, file: StoredFile) -> AsyncGenerator[bytes]:
        """Yield the content. No connection is held while the reader takes its time."""
        read_bytes = number = 0
        while read_bytes < file.bytes:
            async with self._pool.connection() as connection:
                chunk = await read_chunk(connection, self._vault, file.id, number)
            if chunk is None:
                raise no_such_file()  # deleted meanwhile
            yield chunk
            read_bytes += len(chunk)
            number += 1

    async def _reserve(
        self,
        file_id: str,
        owner: str,
        filename: str,
        size_bytes: int,
        keep_s: int,
        config: FilesConfig,
    ) -> None:
        most = config.max_bytes_per_principal
        text = filename_place(file_id), filename.encode()
        async with self._pool.connection() as connection, connection.transaction():
            [name] = await self._vault.seal(connection, owner, [text])
            await connection.execute(query("lock_owner"), owner)
            values = (file_id, owner, BATCH_INPUT, size_bytes, keep_s, most)
            sealed = (name.key_id, name.sealed)
            if await connection.fetchrow(query("add_file"), *values, *sealed) is None:
                raise FileQuotaExceeded(
                    f"With this file you would hold more than {most} bytes. "
                    "Delete files that you no longer need.",
                    param="file",
                )

    async def _discard(self, file_id: str) -> None:
        with suppress(Unavailable):
            async with self._pool.connection() as connection:
                await connection.execute(query("discard_file"), file_id)


def no_such_file() -> NotFound:
    """Return the refusal of a file that is not there or is another owner's."""
    return NotFound("You have no file of that id. GET /v1/files lists your files.", param="file_id")


async def _files(connection: Connection, vault: Vault, rows: Sequence[Row]) -> list[StoredFile]:
    names = await vault.open(connection, [filename_of(row) for row in rows])
    return [_file(row, name) for row, name in zip(rows, names, strict=True)]


async def add_chunk(
    connection: Connection, vault: Vault, owner: str, place: tuple[str, int], chunk: bytes
) -> None:
    """Add a chunk of a file of `owner`; `place` is the id of the file and its number in it.

    Raises:
        RuntimeError: `connection` is not in a transaction.
    """
    [one] = await vault.seal(connection, owner, [(chunk_place(*place), chunk)])
    await connection.execute(query("add_chunk"), *place, one.key_id, one.sealed)


async def read_chunk(
    connection: Connection, vault: Vault, file_id: str, number: int
) -> bytes | None:
    """Return a chunk; None where it is not there, or its key was destroyed."""
    row = await connection.fetchrow(query("read_chunk"), file_id, number)
    if row is None:
        return None
    [chunk] = await vault.open(
        connection, [cell(row, chunk_place(file_id, number), plain="content")]
    )
    return chunk


def filename_of(row: Row) -> Cell:
    """Return the name in a row of `files`, as it is stored; ours for results is in the clear."""
    return cell(row, filename_place(row["id"]), plain="filename")


def _file(row: Row, filename: bytes | None) -> StoredFile:
    return StoredFile(
        id=row["id"],
        owner=row["owner"],
        purpose=row["purpose"],
        filename="" if filename is None else filename.decode(),
        bytes=row["bytes"],
        status=row["status"],
        created_at=row["created_at"],
        expires_at=row["expires_at"],
    )
