"""Calls that are made together: one for all who ask while another is under way."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

# A call that takes longer does not keep the next ones back: what it asks may be stuck.
_PATIENCE_S = 0.02

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


@dataclass(eq=False, slots=True)
class _Waiter(Generic[Asked, Answer]):
    asked: Asked
    answered: asyncio.Future[Answer] = field(default_factory=asyncio.Future)


class GroupedCalls(Generic[Asked, Answer]):
    """Makes one call of what many ask.

    Who comes first is sent on at once. Who comes while that call is under way goes with the next,
    when the first has ended or takes long. So nobody waits for a timer, and the more there is to
    do, the less each of it costs.

    Args:
        call: takes what is asked; returns an answer to each, in the same order. What it raises
            goes to all of them.
        most: how many go with one call.
    """

    def __init__(
        self, call: Callable[[Sequence[Asked]], Awaitable[Sequence[Answer]]], *, most: int
    ) -> None:
        self._call = call
        self._most = most
        self._waiting: list[_Waiter[Asked, Answer]] = []
        self._sending: asyncio.Task[None] | None = None
        # The event loop itself holds tasks only weakly.
        self._calls: set[asyncio.Task[Sequence[Answer]]] = set()
        # A call serves several requests: none is tied to the one that came first.
        self._context = contextvars.copy_context()

    async def ask(self, asked: Asked) -> Answer:
        """Return the answer. Where this is cancelled, the call still goes on for the others."""
        waiter: _Waiter[Asked, Answer] = _Waiter(asked)
        self._waiting.append(waiter)
        if self._sending is None:
            self._sending = asyncio.create_task(
                self._send(), name="grouped-calls", context=self._context.copy()
            )
        return await waiter.answered

    async def _send(self) -> None:
        try:
            while group := self._take():
                call = asyncio.create_task(self._make(group), name="grouped-call")
                self._calls.add(call)
                call.add_done_callback(partial(self._hand_out, group))
                await asyncio.wait([call], timeout=_PATIENCE_S)
        finally:
            self._sending = None

    def _take(self) -> list[_Waiter[Asked, Answer]]:
        """Return those who are next, without those who have gone meanwhile."""
        waiting = [waiter for waiter in self._waiting if not waiter.answered.done()]
        self._waiting = waiting[self._most :]
        return waiting[: self._most]

    async def _make(self, group: Sequence[_Waiter[Asked, Answer]]) -> Sequence[Answer]:
        return await self._call([waiter.asked for waiter in group])

    def _hand_out(
        self,
        group: Sequence[_Waiter[Asked, Answer]],
        call: asyncio.Task[Sequence[Answer]],
    ) -> None:
        self._calls.discard(call)
        waiting = [waiter.answered for waiter in group]
        if call.cancelled():
            _each_open(waiting, lambda answered: answered.cancel())
        elif (error := call.exception()) is not None:
            _each_open(waiting, lambda answered: answered.set_exception(error))
        else:
            for answered, answer in zip(waiting, call.result(), strict=True):
                if not answered.done():
                    answered.set_result(answer)


def _each_open(
    waiting: Sequence[asyncio.Future[Answer]], end: Callable[[asyncio.Future[Answer]], object]
) -> None:
    for answered in waiting:
        if not answered.done():
            end(answered)
