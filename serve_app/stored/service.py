"""The responses of a gateway: those that are kept, and those that it makes in the background."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import orjson

from serve_app.completions.collected import Answered
from serve_app.completions.parts import OnBehalf
from serve_app.config import GatewayConfig
from serve_app.errors import InvalidRequest
from serve_app.stored.background import BackgroundRuns, Draft
from serve_app.stored.items import InputItem
from serve_app.stored.keeping import Keeping
from serve_app.stored.responses import ResponseStore

# Makes a response for somebody, along the path of any other request.
Make = Callable[[OnBehalf, bytes, str], Awaitable[Answered]]


@dataclass(frozen=True, slots=True)
class Page:
    """Which items of a list are asked for."""

    limit: int = 20
    ascending: bool = False
    after: str | None = None


class Responses:
    """What clients may do with responses, but for making one at once."""

    def __init__(
        self,
        store: ResponseStore,
        make: Make,
        spawn: Callable[[Coroutine[Any, Any, Any]], asyncio.Task[Any]],
    ) -> None:
        self.store = store
        self._make = make
        self._runs = BackgroundRuns(store, spawn)

    async def put_off(
        self, config: GatewayConfig, keeping: Keeping, on_behalf: OnBehalf, request_id: str
    ) -> bytes:
        """Begin to make a response in the background; return it as it is now, queued.

        Raises:
            ResponseNotFound, InvalidRequest: the conversation cannot be continued.
            Unavailable: this gateway makes as many as it may.
            StoreUnavailable: it cannot be kept.
        """
        await keeping.look_back()
        stored, body = keeping.put_off()

        async def ask() -> Answered:
            return await self._make(on_behalf, body, request_id)

        draft = Draft(stored=stored, ask=ask, give_up_after_s=config.deadline_s)
        await self._runs.start(draft, config.responses.max_background)
        return orjson.dumps(stored.response)

    async def retrieve(self, response_id: str, principal_id: str) -> bytes:
        """Return a response. Raises ResponseNotFound."""
        return orjson.dumps(await self.store.find(response_id, principal_id))

    async def delete(self, response_id: str, principal_id: str) -> bytes:
        """Remove a response; if it is under way it ends. Raises ResponseNotFound."""
        await self.store.delete(response_id, principal_id)
        self._runs.stop(response_id)
        return orjson.dumps({"id": response_id, "object": "response", "deleted": True})

    async def cancel(self, response_id: str, principal_id: str) -> bytes:
        """End a background response, wherever it runs, and return it.

        Raises:
            ResponseNotFound: it is not there.
            InvalidRequest: it does not run in the background.
        """
        response = await self.store.cancel(response_id, principal_id)
        if response["status"] == "cancelled":
            self._runs.stop(response_id)
        return orjson.dumps(response)

    async def input_items(
        self, config: GatewayConfig, response_id: str, principal_id: str, page: Page
    ) -> bytes:
        """List what the model was given for a response.

        Raises:
            ResponseNotFound: it is not there.
            InvalidRequest: the page does not begin in it.
        """
        items = await self.store.input_items(response_id, principal_id, config.max_body_bytes)
        return orjson.dumps(_listed(items, page))

    def close(self) -> None:
        """Take no more background responses; those that run are waited for by the gateway."""
        self._runs.close()


def _listed(items: list[InputItem], page: Page) -> dict[str, Any]:
    ordered = items if page.ascending else items[::-1]
    ids = [one.id for one in ordered]
    if page.after is not None and page.after not in ids:
        raise InvalidRequest("`after` must be the id of an item of this list.", param="after")
    start = 0 if page.after is None else ids.index(page.after) + 1
    shown = ordered[start : start + page.limit]
    return {
        "object": "list",
        "data": [one.listed() for one in shown],
        "first_id": shown[0].id if shown else None,
        "last_id": shown[-1].id if shown else None,
        "has_more": start + page.limit < len(ordered),
    }
