"""How much of an answer is still on its way out of this process.

An ASGI server holds a `send` back while its buffers are full, and so tells that a client does
not read. Ray Serve does not: it puts every message on a queue without a bound. But both let go
of the bytes once they have passed them on, and so the bytes themselves can tell.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

_FIRST_NUDGE_S = 0.001
_LAST_NUDGE_S = 0.5


class Flow:
    """Counts the bytes of one answer that were handed on and not let go yet."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._held_bytes = 0
        # Let go in whatever thread; a deque takes and gives in one step.
        self._let_go: deque[int] = deque()
        self._moved = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._waiting = 0

    def part(self, data: bytes) -> bytes:
        """Return `data`, counted as held until nobody has a reference to it."""
        self._held_bytes += len(data)
        return _Part(data, self._part_let_go)

    @property
    def held_bytes(self) -> int:
        """Bytes that are held now."""
        while self._let_go:
            self._held_bytes -= self._let_go.popleft()
        return self._held_bytes

    async def room(self, timeout_s: float, nudge: Callable[[], Awaitable[None]]) -> None:
        """Wait until less than the most is held.

        Serve keeps the last messages that it has passed on until it gets others, so while we
        wait it is given some: `nudge` sends nothing, in a message.

        Raises:
            TimeoutError: nothing was let go for `timeout_s`.
        """
        while self.held_bytes > self._most_bytes:
            self._moved.clear()
            self._waiting += 1
            try:
                async with asyncio.timeout(timeout_s):
                    await self._until_moved(nudge)
            finally:
                self._waiting -= 1

    async def _until_moved(self, nudge: Callable[[], Awaitable[None]]) -> None:
        pause_s = _FIRST_NUDGE_S
        # Some may have gone before it was said that we wait.
        while self.held_bytes > self._most_bytes and not self._moved.is_set():
            await nudge()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._moved.wait()
            pause_s = min(pause_s * 2, _LAST_NUDGE_S)

    def _part_let_go(self, size_bytes: int) -> None:
        self._let_go.append(size_bytes)
        if self._waiting:
            # The loop may be gone where this is the end of the process.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._moved.set)


class _Part(bytes):
    """Bytes that say when they are let go. Copied or pickled they are plain bytes."""

    _gone: Callable[[int], None]

    def __new__(cls, data: bytes, gone: Callable[[int], None]) -> _Part:
        part = super().__new__(cls, data)
        part._gone = gone
        return part

    def __reduce__(self) -> tuple[Any, ...]:
        return bytes, (bytes(self),)

    def __del__(self) -> None:
        self._gone(len(self))
