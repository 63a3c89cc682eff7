"""The responses that are kept for their callers, in PostgreSQL.

Only the principal that made a response finds it. Nothing of what it holds goes into an error or
a log line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from serve_app.errors import InvalidRequest, ResponseNotFound
from serve_app.lazy_pool import LazyPool
from serve_app.sql import named_queries
from serve_app.stored.items import InputItem, dump_items, load_items, output_items

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


class ResponseStore:
    """The table of responses. Raises StoreUnavailable while PostgreSQL is away."""

    def __init__(self, pool: LazyPool) -> None:
        self._pool = pool
        self._sql = named_queries("serve_app.stored", "responses.sql")

    async def check(self) -> None:
        """Return if something could be stored now."""
        async with self._pool.connection() as connection:
            await connection.execute("select 1")

    async def add(self, stored: StoredResponse) -> None:
        """Keep a new response."""
        async with self._pool.connection() as connection, connection.transaction():
            await connection.execute(
                self._sql["insert_response"],
                stored.id,
                stored.principal_id,
                stored.model,
                stored.response["status"],
                stored.background,
                stored.previous_id,
                _dump(stored.response),
                dump_items(stored.items),
                stored.keep_s,
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
        return _seen(row["response"], abandoned=row["abandoned"])

    async def conversation(
        self, response_id: str, principal_id: str, max_bytes: int
    ) -> Conversation:
        """Return what a request that continues `response_id` is to begin with.

        Raises:
            ResponseNotFound: it, or one that it continues, is not there.
            InvalidRequest: it has no answer to continue, or the conversation is too long.
        """
        rows = await self._chain(response_id, principal_id, MAX_CHAIN, max_bytes)
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
        return Conversation([row["id"] for row in rows], [i for r in rows for i in _turn(r)])

    async def input_items(
        self, response_id: str, principal_id: str, max_bytes: int
    ) -> list[InputItem]:
        """Return what the model was given for a response, oldest first: the conversation that
        it continues, as far as it is still there, and its own items. Raises ResponseNotFound.
        """
        rows = await self._chain(response_id, principal_id, MAX_CHAIN, max_bytes)
        if not rows:
            raise not_found(response_id)
        *earlier, last = rows
        return [i for row in earlier for i in _turn(row)] + load_items(last["input_items"])

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
            response = _seen(row["response"], abandoned=row["abandoned"])
            if response["status"] in _UNDER_WAY:
                response = {**response, "status": "cancelled"}
                await connection.execute(
                    self._sql["advance"], response_id, "cancelled", _dump(response)
                )
            return response

    async def advance(self, response: dict[str, Any]) -> bool:
        """Put `response` in the place of its earlier state.

        Returns False, and changes nothing, if it was cancelled or deleted meanwhile.
        """
        async with self._pool.connection() as connection:
            found = await connection.fetchval(
                self._sql["advance"], response["id"], response["status"], _dump(response)
            )
        return found is not None

    async def beat(self, response_ids: Sequence[str]) -> set[str]:
        """Say that these are still run; return those that are still to be."""
        async with self._pool.connection() as connection:
            rows = await connection.fetch(self._sql["beat"], list(response_ids))
        return {row["id"] for row in rows}

    async def _chain(
        self, response_id: str, principal_id: str, depth: int, max_bytes: int
    ) -> list[Any]:
        async with self._pool.connection() as connection:
            return await connection.fetch(
                self._sql["chain"], response_id, principal_id, depth, max_bytes
            )


def not_found(response_id: str, *, param: str | None = None) -> ResponseNotFound:
    """Return the error for a response that is not there."""
    return ResponseNotFound(
        f"The response `{response_id[:100]}` does not exist, was not stored, or is kept no longer.",
        param=param,
    )


def _turn(row: Any) -> list[InputItem]:
    """Return what a turn of a conversation added to it."""
    return load_items(row["input_items"]) + output_items(orjson.loads(row["response"]))


def _seen(text: str, *, abandoned: bool) -> dict[str, Any]:
    response: dict[str, Any] = orjson.loads(text)
    # Seen so, and not written so: its gateway may only have lost sight of PostgreSQL.
    return {**response, "status": "failed", "error": ABANDONED} if abandoned else response


def _dump(response: dict[str, Any]) -> str:
    return orjson.dumps(response).decode()
