"""The side that calls: keeps a connection, to what may be replaced at any time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from serve_app.background import stop_tasks
from serve_app.backoff import Backoff
from serve_app.direct.connection import DirectConnection
from serve_app.direct.procedures import Answer, Asked, Door, LineLost, Procedure

# So often it is asked where calls go now: to a replica that has taken over, or to one of several.
_LOOK_EVERY_S = 5.0
_FIND_TIMEOUT_S = 5.0
_RETRY_FIRST_S = 0.05
_RETRY_MOST_S = 1.0
# An answer takes milliseconds. Without one in this time another way is tried.
_ANSWER_TIMEOUT_S = 3.0


class DirectLine:
    """Direct calls to whatever `find` leads to; it raises LineLost where that is not known."""

    def __init__(self, find: Callable[[], Awaitable[Door]]) -> None:
        self._find = find
        self._door: Door | None = None
        self._connection: DirectConnection | None = None
        self._keeping: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to connect."""
        self._keeping = asyncio.create_task(self._keep(), name="direct-line")

    async def close(self) -> None:
        """Give the connection up."""
        await stop_tasks(self._keeping)
        if self._connection is not None:
            self._connection.close()

    async def call(self, procedure: Procedure[Asked, Answer], asked: Asked) -> Answer:
        """Return the answer. If this is cancelled, the call may be done all the same.

        Raises:
            LineLost: there is no connection, or it was lost: it is not known whether the call
                was done.
        """
        if self._connection is None or not self._connection.usable:
            raise LineLost("There is no connection.")
        return await self._connection.call(procedure, asked, _ANSWER_TIMEOUT_S)

    async def _keep(self) -> None:
        backoff = Backoff(_RETRY_FIRST_S, _RETRY_MOST_S)
        while True:
            try:
                async with asyncio.timeout(_FIND_TIMEOUT_S):
                    connection = await self._connected(await self._find())
            except (LineLost, OSError):  # TimeoutError is an OSError
                await asyncio.sleep(backoff.next_s())
                continue
            backoff.reset()
            await connection.until_lost(_LOOK_EVERY_S)

    async def _connected(self, door: Door) -> DirectConnection:
        before = self._connection
        if before is not None and before.usable and door == self._door:
            return before
        self._connection = after = await DirectConnection.open(door)
        self._door = door
        if before is not None:
            before.retire()
        return after
