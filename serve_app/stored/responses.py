"""The responses that are kept for their callers, in PostgreSQL.

Only the principal that made a response finds it. What it holds is sealed with the key of that
principal, and nothing of it goes into an error or a log line. A response whose key was destroyed
is not there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from serve_app.accounts.sealing.cells import Cell, Row, cell
from serve_app.accounts.sealing.places import response_items_place, response_place
from serve_app.errors import InvalidRequest, ResponseNotFound
from serve_app.lazy_pool import Connection, LazyPool
from serve_app.sql import named_queries
from serve_app.stored.items import InputItem, dump_items, load_items, output_items
from serve_app.stored.vault import Vault

# Longest conversation that `previous_response_id` continues.
MAX_CHAIN = 200
# A background response whose gateway said nothing for so long has lost it.
ABANDONED_S = 30.0
ABANDONED = {
    "code": "server_error",
    "message": "The gateway that ran this response was lost. Create the response again.",
}
_UNDER_WAY = ("queued", "in_progress")
_CONTINUABLE = ("completed", "incomplete")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredResponse:
    """A response as it is kept, and the items of its own request."""

    id: str
    principal_id: str
    model: str
    response: dict[str, Any]
    items: Sequence[InputItem]
    keep_s: float
    background: bool = False
    previous_id: str | None = None
    # The responses that it continues, which are kept as long as it.
    chain: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a response continues: the responses by id, oldest first, and all their items."""

    ids: Sequence[str]
    items: Sequence[InputItem]


NOTHING_BEFORE = Conversation((), ())


@dataclass(frozen=True, slots=True)
class _Turn:
    """A response of a conversation, opened."""

    response: dict[str, Any]
    items: list[InputItem]

    def added(self) -> list[InputItem]:
        """Return what it added to the conversation."""
        return self.items + output_items(self.response)


class ResponseStore:
    """The table of responses. Raises StoreUnavailable while PostgreSQL or a key is away."""

    def __init__(self, pool: LazyPool, vault: Vault) -> None:
        self._pool = pool
        self._vault = vault
        self._sql = named_queries("serve_app.stored", "responses.sql")

    async def check(self) -> None:
        """Return if something could be stored now."""
        async with self._pool.connection() as connection:
            await connection.execute("select 1")

    async def add(self, stored: StoredResponse) -> None:
        """Keep a new response."""
        texts = (
            (response_place(stored.id), orjson.dumps(stored.response)),
            (response_items_place(stored.id), dump_items(stored.items)),
        )
        async with self._pool.connection() as connection, connection.transaction():
            response, items = await self._vault.seal(connection, stored.principal_id, texts)
            await connection.execute(
                self._sql["insert_response"],
                stored.id,
                stored.principal_id,
                stored.model,
                stored.response["status"],
                stored.background,
                stored.previous_id,
                stored.keep_s,
                *(response.key_id, response.sealed),
                *(items.key_id, items.sealed),
            )
            if stored.chain:
                await connection.execute(self._sql["prolong"], list(stored.chain), stored.keep_s)

    async def find(self, response_id: str, principal_id: str) -> dict[str, Any]:
        """Return a response. Raises ResponseNotFound."""
        async with self._pool.connection() as connection:
            row = await connection.fetchrow(
                self._sql["find_response"], response_id, principal_id, ABANDONED_S
            )
            if row is None:
                raise not_found(response_id)
            return await self._seen(connection, row)

    async def conversation(
        self, response_id: str, principal_id: str, max_bytes: int
    ) -> Conversation:
        """Return what a request that continues `response_id` is to begin with.

        Raises:
            ResponseNotFound: it, or one that it continues, is not there.
            InvalidRequest: it has no answer to continue, or the conversation is too long.
        """
        rows, turns = await self._chain(response_id, principal_id, MAX_CHAIN, max_bytes)
        if not rows:
            raise not_found(response_id, param="previous_response_id")
        oldest, newest = rows[0], rows[-1]
        if oldest["depth"] > MAX_CHAIN or oldest["bytes"] > max_bytes:
            raise InvalidRequest(
                f"The conversation is longer than {MAX_CHAIN} responses or {max_bytes} bytes. "
                "Begin a new one with a summary of it.",
                param="previous_response_id",
            )
        if oldest["previous_id"] is not None:
            raise not_found(oldest["previous_id"], param="previous_response_id")
        if newest["status"] not in _CONTINUABLE:
            raise InvalidRequest(
                f"The response `{response_id[:100]}` is {newest['status']}, and only one that "
                "has ended with an answer can be continued.",
                param="previous_response_id",
            )
        if None in turns:
            raise not_found(response_id, param="previous_response_id")
        return Conversation([row["id"] for row in rows], _added(turns))

    async def input_items(
        self, response_id: str, principal_id: str, max_bytes: int
    ) -> list[InputItem]:
        """Return what the model was given for a response, oldest first: the conversation that
        it continues, as far as it is still there, and its own items. Raises ResponseNotFound.
        """
        _, turns = await self._chain(response_id, principal_id, MAX_CHAIN, max_bytes)
        *earlier, last = turns or [None]
        if last is None:
            raise not_found(response_id)
        return _added(earlier) + last.items

    async def delete(self, response_id: str, principal_id: str) -> None:
        """Remove a response; one that is under way ends. Raises ResponseNotFound."""
        async with self._pool.connection() as connection:
            if not await connection.fetchval(
                self._sql["delete_response"], response_id, principal_id
            ):
                raise not_found(response_id)

    async def cancel(self, response_id: str, principal_id: str) -> dict[str, Any]:
        """Mark a background response as cancelled, unless it has ended, and return it.

        Raises:
            ResponseNotFound: it is not there.
            InvalidRequest: it does not run in the background.
        """
        async with self._pool.connection() as connection, connection.transaction():
            row = await connection.fetchrow(
                self._sql["lock_background"], response_id, principal_id, ABANDONED_S
            )
            if row is None:
                raise not_found(response_id)
            if not row["background"]:
                raise InvalidRequest(
                    "Only a response with `background: true` can be cancelled. Close the "
                    "connection to end any other.",
                    param="response_id",
                )
            response = await self._seen(connection, row)
            if response["status"] in _UNDER_WAY:
                response = {**response, "status": "cancelled"}
                await self._advance(connection, response, principal_id)
            return response

    async def advance(self, response: dict[str, Any], principal_id: str) -> bool:
        """Put `response` in the place of its earlier state.

        Returns False, and changes nothing, if it was cancelled or deleted meanwhile.
        """
        async with self._pool.connection() as connection, connection.transaction():
            return await self._advance(connection, response, principal_id)

    async def beat(self, response_ids: Sequence[str]) -> set[str]:
        """Say that these are still run; return those that are still to be."""
        async with self._pool.connection() as connection:
            rows = await connection.fetch(self._sql["beat"], list(response_ids))
        return {row["id"] for row in rows}

    async def _advance(
        self, connection: Connection, response: dict[str, Any], principal_id: str
    ) -> bool:
        text = response_place(response["id"]), orjson.dumps(response)
        [one] = await self._vault.seal(connection, principal_id, [text])
        values = response["id"], response["status"], one.key_id, one.sealed
        return await connection.fetchval(self._sql["advance"], *values) is not None

    async def _chain(
        self, response_id: str, principal_id: str, depth: int, max_bytes: int
    ) -> tuple[list[Any], list[_Turn | None]]:
        """Return the rows, the oldest first, and what they hold; None where the key is gone."""
        async with self._pool.connection() as connection:
            rows = await connection.fetch(
                self._sql["chain"], response_id, principal_id, depth, max_bytes
            )
            texts = await self._vault.open(
                connection, [one for row in rows for one in response_texts(row)]
            )
        pairs = zip(texts[::2], texts[1::2], strict=True)
        return rows, [_turn(response, items) for response, items in pairs]

    async def _seen(self, connection: Connection, row: Any) -> dict[str, Any]:
        """Return the response in a row. Raises ResponseNotFound where its key was destroyed."""
        [text] = await self._vault.open(
            connection, [cell(row, response_place(row["id"]), plain="response")]
        )
        if text is None:
            raise not_found(row["id"])
        response: dict[str, Any] = orjson.loads(text)
        # Seen so, and not written so: its gateway may only have lost sight of PostgreSQL.
        abandoned = {"status": "failed", "error": ABANDONED} if row["abandoned"] else {}
        return {**response, **abandoned}


def not_found(response_id: str, *, param: str | None = None) -> ResponseNotFound:
    """Return the error for a response that is not there."""
    return ResponseNotFound(
        f"The response `{response_id[:100]}` does not exist, was not stored, or is kept no longer.",
        param=param,
    )


def response_texts(row: Row) -> tuple[Cell, Cell]:
    """Return what a row has of its response and of the items of its request."""
    items = cell(
        row,
        response_items_place(row["id"]),
        plain="input_items",
        sealed="sealed_items",
        key_id="items_key_id",
    )
    return cell(row, response_place(row["id"]), plain="response"), items


def _turn(response: bytes | None, items: bytes | None) -> _Turn | None:
    if response is None or items is None:
        return None
    return _Turn(orjson.loads(response), load_items(items))


def _added(turns: Iterable[_Turn | None]) -> list[InputItem]:
    return [item for turn in turns if turn is not None for item in turn.added()]
