"""Files in PostgreSQL, in chunks: never one of them whole in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from serve_app.batches.queries import query
from serve_app.config import FilesConfig
from serve_app.errors import FileQuotaExceeded, NotFound, StoreUnavailable, Unavailable
from serve_app.lazy_pool import LazyPool
from serve_app.records import new_id

if TYPE_CHECKING:
    import asyncpg

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
    """The files of all owners. Every method raises StoreUnavailable without PostgreSQL."""

    def __init__(self, pool: LazyPool) -> None:
        self._pool = pool

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
                async with self._pool.connection() as connection:
                    await connection.execute(query("add_chunk"), file_id, number, chunk)
                number += 1
            async with self._pool.connection() as connection:
                row = await connection.fetchrow(query("publish_file"), file_id)
        except BaseException:
            # The owner would have to wait for its bytes until the hourly sweep.
            await asyncio.shield(self._discard(file_id))
            raise
        if row is None:
            raise StoreUnavailable  # the upload took so long that it was swept away
        return to_file(row)

    async def find(self, owner: str, file_id: str) -> StoredFile:
        """Return one file. Raises NotFound where the owner has none of that id."""
        async with self._pool.connection() as connection:
            row = await connection.fetchrow(query("find_file"), file_id, owner)
        if row is None:
            raise no_such_file()
        return to_file(row)

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
        return [to_file(row) for row in rows]

    async def read(self, file: StoredFile) -> AsyncGenerator[bytes]:
        """Yield the content. No connection is held while the reader takes its time."""
        read_bytes = number = 0
        while read_bytes < file.bytes:
            async with self._pool.connection() as connection:
                chunk = await connection.fetchval(query("read_chunk"), file.id, number)
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
        async with self._pool.connection() as connection, connection.transaction():
            await connection.execute(query("lock_owner"), owner)
            values = (file_id, owner, BATCH_INPUT, filename, size_bytes, keep_s, most)
            if await connection.fetchrow(query("add_file"), *values) is None:
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


def to_file(row: asyncpg.Record) -> StoredFile:
    """Return the file in a row."""
    return StoredFile(**dict(row))
