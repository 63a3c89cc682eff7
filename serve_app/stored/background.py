"""Responses that are made in the background: answered at once, run here, kept in PostgreSQL.

A run is a request on its caller's behalf, with all the steps of one. While it lasts its gateway
says so in the table every few seconds, and learns there that a response was cancelled or deleted
through another gateway. A response whose gateway was lost is seen as failed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import orjson

from serve_app.completions.collected import Answered
from serve_app.errors import InternalError, RequestError, Unavailable
from serve_app.stored.responses import ResponseStore, StoredResponse

logger = logging.getLogger(__name__)

BEAT_S = 2.0
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
# How long the end of a response is tried to be kept while PostgreSQL is away.
_KEEP_TRYING_S = 3600.0
# Answers that say that there is no room now.
_NO_ROOM = (429, 503)
# In the words of the API's reference, which knows no others that fit.
_CODES = {400: "invalid_prompt", 404: "invalid_prompt", 429: "rate_limit_exceeded"}
# What a response keeps of the time when it was queued.
_OWN = ("id", "created_at", "background", "store", "previous_response_id")

Ask = Callable[[], Awaitable[Answered]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A response that is to be made: how it is kept, how it is asked for, and until when."""

    stored: StoredResponse
    ask: Ask
    give_up_after_s: float


class BackgroundRuns:
    """The background responses that this gateway makes, at most so many as it is told."""

    def __init__(self, store: ResponseStore, spawn: Callable[[Any], asyncio.Task[Any]]) -> None:
        self._store = store
        self._spawn = spawn
        self._runs: dict[str, asyncio.Task[None]] = {}
        self._starting = 0
        self._beating: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    async def start(self, draft: Draft, most: int) -> None:
        """Keep `draft` as queued, and begin to make it.

        Raises:
            Unavailable: `most` are under way here, or the gateway is about to stop.
            StoreUnavailable: it cannot be kept.
        """
        if self._closing.is_set() or len(self._runs) + self._starting >= most:
            raise Unavailable(
                f"This gateway makes {most} responses in the background, and takes no more now.",
                retry_after_s=_FIRST_PAUSE_S,
            )
        self._starting += 1
        try:
            await self._store.add(draft.stored)
        finally:
            self._starting -= 1
        run = self._spawn(self._run(draft))
        self._runs[draft.stored.id] = run
        run.add_done_callback(lambda _: self._runs.pop(draft.stored.id, None))
        if self._beating is None or self._beating.done():
            self._beating = self._spawn(self._beat())

    def stop(self, response_id: str) -> None:
        """End the run of a response that was cancelled or deleted, if it is one of ours."""
        if (run := self._runs.get(response_id)) is not None:
            run.cancel()

    def close(self) -> None:
        """Take no more, and try none again that found no room; the others run to their end."""
        self._closing.set()

    async def _run(self, draft: Draft) -> None:
        queued, owner = draft.stored.response, draft.stored.principal_id
        if not await self._keep({**queued, "status": "in_progress"}, owner):
            return
        await self._keep(ended(queued, await self._answer(draft)), owner)

    async def _answer(self, draft: Draft) -> Answered:
        """Ask until there is room, the time is over, or this gateway stops."""
        over_s = time.monotonic() + draft.give_up_after_s
        pause_s = _FIRST_PAUSE_S
        while True:
            answered = await draft.ask()
            if answered.status not in _NO_ROOM or time.monotonic() + pause_s > over_s:
                return answered
            if await self._closes_within(pause_s):
                return answered
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)

    async def _keep(self, response: dict[str, Any], principal_id: str) -> bool:
        """Put `response` into the table; tell whether it is still wanted there."""
        over_s = time.monotonic() + _KEEP_TRYING_S
        while True:
            try:
                return await self._store.advance(response, principal_id)
            except RequestError as error:
                if time.monotonic() > over_s or await self._closes_within(BEAT_S):
                    logger.error(
                        "background response %s was not kept: %s",
                        response["id"],
                        type(error).__name__,
                    )
                    return False

    async def _closes_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                return await self._closing.wait()
        except TimeoutError:
            return False

    async def _beat(self) -> None:
        while self._runs:
            await asyncio.wait(self._runs.values(), timeout=BEAT_S)
            beating = list(self._runs)
            try:
                wanted = await self._store.beat(beating)
            except RequestError:
                # PostgreSQL is away: whether a run is still wanted is asked again.
                continue
            for response_id in set(beating) - wanted:
                self.stop(response_id)


def ended(queued: dict[str, Any], answered: Answered) -> dict[str, Any]:
    """Return the response that `queued` came to."""
    try:
        body: dict[str, Any] = orjson.loads(answered.body)
    except orjson.JSONDecodeError:
        return _failed(queued, "server_error", InternalError().message)
    if answered.status != 200:
        code = _CODES.get(answered.status, "server_error")
        return _failed(queued, code, body["error"]["message"])
    return {**body, **{name: queued[name] for name in _OWN}}


def _failed(queued: dict[str, Any], code: str, message: str) -> dict[str, Any]:
    return {**queued, "status": "failed", "error": {"code": code, "message": message}}
