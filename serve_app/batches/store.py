"""The batches of all owners, for those who ask about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serve_app.accounts.sealing.places import batch_place
from serve_app.batches.batch import (
    WINDOW,
    WINDOW_S,
    Counts,
    Status,
    batch_to_openai,
    new_batch_id,
    principal_to_json,
)
from serve_app.batches.queries import query
from serve_app.batches.words import BatchWords, batch_words
from serve_app.config import GatewayConfig
from serve_app.errors import InvalidRequest, NotFound, RateLimited
from serve_app.identity.principal import Principal
from serve_app.lazy_pool import Connection, LazyPool
from serve_app.stored.vault import Vault

if TYPE_CHECKING:
    import asyncpg

_TRY_AGAIN_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NewBatch:
    """What somebody wants to be run."""

    endpoint: str
    input_file_id: str
    metadata: Mapping[str, str] | None
    output_expires_after_s: int | None


class BatchStore:
    """Every method raises StoreUnavailable without PostgreSQL or a key."""

    def __init__(self, pool: LazyPool, vault: Vault) -> None:
        self._pool = pool
        self._vault = vault

    async def add(
        self, principal: Principal, new: NewBatch, config: GatewayConfig
    ) -> dict[str, Any]:
        """Keep a new batch; a gateway begins it soon.

        Raises:
            RateLimited: too many batches of this principal have not ended yet.
        """
        most_open = config.batches.max_open_per_principal
        batch_id, words = new_batch_id(), BatchWords(metadata=new.metadata)
        async with self._pool.connection() as connection, connection.transaction():
            text = batch_place(batch_id), words.dump()
            [sealed] = await self._vault.seal(connection, principal.id, [text])
            await connection.execute(query("lock_owner"), principal.id)
            row = await connection.fetchrow(
                query("add_batch"),
                batch_id,
                principal.id,
                principal_to_json(principal),
                principal.api_key_id,
                new.endpoint,
                WINDOW,
                new.input_file_id,
                new.output_expires_after_s,
                WINDOW_S,
                # Counted from now, and the batch may take the whole window.
                WINDOW_S + config.files.retention_s,
                most_open,
                *(sealed.key_id, sealed.sealed),
            )
        if row is None:
            raise RateLimited(
                f"You have {most_open} batches that have not ended. Wait for one to end.",
                retry_after_s=_TRY_AGAIN_S,
            )
        return batch_to_openai(row, words, None)

    async def find(self, owner: str, batch_id: str) -> dict[str, Any]:
        """Return one batch. Raises NotFound where the owner has none of that id."""
        async with self._pool.connection() as connection:
            row = await _found(connection, owner, batch_id)
            [batch] = await _described(connection, self._vault, [row])
            return batch

    async def list(self, owner: str, *, after: str | None, limit: int) -> list[dict[str, Any]]:
        """Return up to `limit` batches, the newest first, that are older than the id `after`."""
        async with self._pool.connection() as connection:
            rows = await connection.fetch(query("list_batches"), owner, after, limit)
            return await _described(connection, self._vault, rows)

    async def cancel(self, owner: str, batch_id: str) -> dict[str, Any]:
        """Stop a batch; what is done stays. Safe to repeat.

        Raises:
            NotFound: the owner has no batch of that id.
            InvalidRequest: it has ended, or its results are being written.
        """
        async with self._pool.connection() as connection:
            row = await connection.fetchrow(query("cancel_batch"), batch_id, owner)
            if row is None:
                row = await _found(connection, owner, batch_id)
                if row["status"] not in (Status.CANCELLING, Status.CANCELLED):
                    raise InvalidRequest(f"A batch that is {row['status']} cannot be cancelled.")
            [batch] = await _described(connection, self._vault, [row])
            return batch


async def _found(connection: Connection, owner: str, batch_id: str) -> asyncpg.Record:
    row = await connection.fetchrow(query("find_batch"), batch_id, owner)
    if row is None:
        raise NotFound(
            "You have no batch of that id. GET /v1/batches lists your batches.", param="batch_id"
        )
    return row


async def _described(
    connection: Connection, vault: Vault, rows: Sequence[asyncpg.Record]
) -> list[dict[str, Any]]:
    counts = await _counts(connection, rows)
    texts = await vault.open(connection, [batch_words(row) for row in rows])
    return [
        batch_to_openai(row, BatchWords.load(text), counts.get(row["id"]))
        for row, text in zip(rows, texts, strict=True)
    ]


async def _counts(connection: Connection, rows: Sequence[asyncpg.Record]) -> dict[str, Counts]:
    # Those that have ended have no lines any more.
    ids = [row["id"] for row in rows if row["status"] in _COUNTED]
    counted = await connection.fetch(query("count_lines"), ids) if ids else []
    return {row["batch_id"]: Counts(row["completed"], row["failed"]) for row in counted}


_COUNTED = frozenset({Status.IN_PROGRESS, Status.FINALIZING, Status.CANCELLING})
