"""Records, appended at the replicas of the RequestLog deployment."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from ray.serve.handle import DeploymentHandle

from deployments.seams.calls import CALL_FAILED, until_answered
from serve_app.errors import LogUnavailable
from serve_app.records import RequestRecord

logger = logging.getLogger(__name__)

# An append takes milliseconds. One that takes longer than this is tried elsewhere.
_PATIENCE_FIRST_S = 5.0
_ALL_TIMEOUT_S = 5.0
_WATCH_EVERY_S = 1.0


class RayRecordSink:
    """Appends records at the RequestLog deployment."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._full = False
        self._watching: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to watch how full the replicas are, so that no request has to ask."""
        self._watching = asyncio.create_task(self._watch(), name="watch-request-log")

    async def close(self) -> None:
        """Stop watching."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])

    @property
    def full(self) -> bool:
        """See `RecordSink.full`: every replica that answered last had no room."""
        return self._full

    async def append(self, record: RequestRecord) -> None:
        """See `RecordSink.append`. Tries again, until cancelled, while a replica is away.

        A repeat is safe, also at another replica: the record has an id, and PostgreSQL takes
        each once. The caller sets the time.
        """
        patience_s = _PATIENCE_FIRST_S
        while True:
            try:
                async with asyncio.timeout(patience_s):
                    await self._append_somewhere(record)
                return
            except TimeoutError:
                logger.warning("the request log did not answer within %g s", patience_s)
                patience_s *= 2
            except LogUnavailable:
                # Ray would ask the same replica again: one that refuses is never busy.
                if await self._append_everywhere(record):
                    return
                raise

    async def _append_somewhere(self, record: RequestRecord) -> None:
        async def append() -> None:
            await self._handle.append.remote(record)

        await until_answered(append, LogUnavailable, LogUnavailable)

    async def _append_everywhere(self, record: RequestRecord) -> bool:
        """Tell whether one replica took `record`, all of them being asked."""
        results = await self._everywhere("append", record)
        return any(not isinstance(result, BaseException) for result in results)

    async def works(self, *, room: bool) -> bool:
        """Tell whether a replica answers and, where `room` is asked for, has room."""
        rooms = await self._rooms()
        return any(rooms) if room else bool(rooms)

    async def _watch(self) -> None:
        while True:
            # Where none answers nothing is known: appends wait for one.
            if rooms := await self._rooms():
                self._full = not any(rooms)
            await asyncio.sleep(_WATCH_EVERY_S)

    async def _rooms(self) -> list[bool]:
        """Return for each replica that answers whether it has room."""
        return [room for room in await self._everywhere("has_room") if isinstance(room, bool)]

    async def _everywhere(self, method: str, *args: Any) -> list[Any]:
        """Call `method` at all replicas; return what each returned or raised."""
        try:
            results: list[Any] = await self._handle.broadcast(method, *args).results_async(
                timeout_s=_ALL_TIMEOUT_S, return_exceptions=True
            )
        except (*CALL_FAILED, TimeoutError):
            return []
        return results
