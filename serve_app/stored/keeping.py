"""What one request for a response reads from the store, and what it puts there."""

from __future__ import annotations

import dataclasses
import logging
import time
from dataclasses import dataclass
from typing import Any

import orjson

from serve_app.completions.body import Ask, dump_body
from serve_app.completions.response_events import final_response, retold
from serve_app.config import Bodies, GatewayConfig
from serve_app.errors import EngineFailed, InvalidRequest, RequestError, UnsupportedParameter
from serve_app.stored.items import input_items
from serve_app.stored.responses import NOTHING_BEFORE, ResponseStore, StoredResponse

logger = logging.getLogger(__name__)

# Ours, not the engine's: its own store is in the memory of one replica.
_OURS = frozenset({"store", "background", "previous_response_id"})
_SET_IN_BACKGROUND = frozenset({"background", "store", "stream"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a request asks of the store."""

    store: bool
    background: bool
    previous_id: str | None


def read_wish(body: dict[str, Any], bodies: Bodies) -> Wish:
    """Return what `body` asks of the store, where `bodies` is kept of its texts.

    Raises:
        InvalidRequest: it asks for what is not kept here, or contradicts itself.
        UnsupportedParameter: it asks for a background response as a stream.
    """
    kept = bodies is Bodies.FULL
    store = _flag(body, "store", default=kept)
    background = _flag(body, "background", default=False)
    previous_id = body.get("previous_response_id")
    if store and not kept:
        raise InvalidRequest(
            f"Prompts and answers of this request are not kept in full (`bodies: {bodies}`), so "
            "no response is stored. Leave `store` out.",
            param="store",
        )
    if background and not store:
        raise InvalidRequest("`background` needs a response that is stored.", param="background")
    if background and body.get("stream"):
        raise UnsupportedParameter(
            "`background` is not supported together with `stream: true`. Leave `stream` out, and "
            "retrieve the response by its id.",
            param="background",
        )
    if previous_id is not None and not isinstance(previous_id, str):
        raise InvalidRequest(
            "`previous_response_id` must be the id of a response.", param="previous_response_id"
        )
    return Wish(store=store, background=background, previous_id=previous_id)


class Keeping:
    """One response's way from and to the store. Making it raises as `read_wish`."""

    def __init__(
        self,
        store: ResponseStore,
        config: GatewayConfig,
        *,
        response_id: str,
        bodies: Bodies,
        principal_id: str,
        model: str,
        body: dict[str, Any],
    ) -> None:
        self._store = store
        self._model = model
        self._config = config
        self._id = response_id
        self._principal_id = principal_id
        self._body = body
        self._before = NOTHING_BEFORE
        self.wish = read_wish(body, bodies)

    async def recall(self, ask: Ask) -> Ask:
        """Return `ask` with the conversation that it continues.

        Raises:
            ResponseNotFound, InvalidRequest: there is no such conversation, or it is too long.
            StoreUnavailable: the response could not be stored either; nothing was generated.
        """
        await self.look_back()
        sent = orjson.loads(ask.payload)
        if self._before.items:
            earlier = [one.item for one in self._before.items]
            sent["input"] = earlier + [one.item for one in input_items(sent["input"])]
        # vLLM takes a null for some of these where it is named, and fails on it later.
        sent = {name: v for name, v in sent.items() if v is not None and name not in _OURS}
        sent |= {"store": False, "request_id": self._id}
        return dataclasses.replace(ask, payload=dump_body(sent), told=self._told())

    async def look_back(self) -> None:
        """Read the conversation that is continued, or see at least that the store is there."""
        if self.wish.previous_id is not None:
            self._before = await self._store.conversation(
                self.wish.previous_id, self._principal_id, self._config.max_body_bytes
            )
        elif self.wish.store:
            await self._store.check()

    async def keep(self, last: bytes) -> bytes:
        """Store the response that `last`, a whole answer or the last event, holds.

        Returns what goes out: where the store has gone away since, the answer says that it is
        not stored. Never raises.
        """
        if not self.wish.store:
            return last
        response = final_response(last)
        try:
            if not isinstance(response.get("status"), str):
                # Not ours to mend: it goes out as the engine sent it.
                raise EngineFailed
            await self._store.add(self._stored(response))
        except RequestError as error:
            logger.warning(
                "the response %s was not stored: %s",
                self._id,
                type(error).__name__,
                extra={"action": "response_not_stored"},
            )
            return retold(last, {"store": False})
        return last

    def put_off(self) -> tuple[StoredResponse, bytes]:
        """Return the response as it is kept until it is made, and the request that makes it."""
        queued = queued_response(self._id, int(time.time()), self._model, self._body)
        asked = {n: v for n, v in self._body.items() if n not in _SET_IN_BACKGROUND}
        return self._stored(queued), dump_body({**asked, "store": False})

    def _stored(self, response: dict[str, Any]) -> StoredResponse:
        return StoredResponse(
            id=self._id,
            principal_id=self._principal_id,
            model=self._model,
            response=response,
            items=input_items(self._body["input"]),
            keep_s=self._config.responses.keep_s,
            background=self.wish.background,
            previous_id=self.wish.previous_id,
            chain=self._before.ids,
        )

    def _told(self) -> dict[str, Any]:
        if not self.wish.store and self.wish.previous_id is None:
            return {}
        return {"store": self.wish.store, "previous_response_id": self.wish.previous_id}


def queued_response(
    response_id: str, created_at: int, model: str, body: dict[str, Any]
) -> dict[str, Any]:
    """Return the response object of a request that is not yet asked of the engine."""
    named = {
        name: body.get(name)
        for name in (
            "instructions",
            "max_output_tokens",
            "metadata",
            "previous_response_id",
            "reasoning",
            "temperature",
            "text",
            "top_p",
            "user",
        )
    }
    return {
        "id": response_id,
        "object": "response",
        "created_at": created_at,
        "status": "queued",
        "background": True,
        "store": True,
        "error": None,
        "incomplete_details": None,
        "model": model,
        "output": [],
        "parallel_tool_calls": True,
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": body.get("tools") or [],
        "truncation": body.get("truncation") or "disabled",
        "usage": None,
        **named,
    }


def _flag(body: dict[str, Any], name: str, *, default: bool) -> bool:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise InvalidRequest(f"`{name}` must be true or false.", param=name)
    return value
