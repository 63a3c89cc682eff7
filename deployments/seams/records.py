"""Records, appended at the replicas of the RequestLog deployment."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ray.serve.handle import DeploymentHandle

from deployments.seams.calls import CallFailed, CallsBroken, called, until_answered
from deployments.seams.direct import line_to
from serve_app.accounts.procedures import APPEND_ALL
from serve_app.background import check_goes_on, stop_tasks
from serve_app.direct import LineLost
from serve_app.errors import LogUnavailable
from serve_app.grouped_calls import GroupedCalls
from serve_app.records import RequestRecord

logger = logging.getLogger(__name__)

# An append takes milliseconds. One that takes longer than this is tried elsewhere.
_PATIENCE_FIRST_S = 5.0
# Of a call whose callers have gone elsewhere meanwhile.
_CALL_TIMEOUT_S = 60.0
_ALL_TIMEOUT_S = 5.0
_WATCH_EVERY_S = 1.0
# Records that go with one call. They may hold texts of some megabytes.
_MOST_IN_A_CALL = 32


class RayRecordSink:
    """Appends records at the RequestLog deployment."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._line = line_to(handle)
        self._full = False
        self._watching: asyncio.Task[None] | None = None
        self._appends = GroupedCalls(self._append_all, most=_MOST_IN_A_CALL)

    def start(self) -> None:
        """Begin to watch how full the replicas are, so that no request has to ask."""
        self._line.start()
        self._watching = asyncio.create_task(self._watch(), name="watch-request-log")

    async def close(self) -> None:
        """Stop watching."""
        await stop_tasks(self._watching)
        await self._line.close()

    def check(self) -> None:
        """Raise CallsBroken where the replicas are watched no more."""
        if self._watching is not None:
            check_goes_on(self._watching, "The request log is watched no more", CallsBroken)

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
                    taken = await self._appends.ask(record)
            except TimeoutError:
                logger.warning("the request log did not answer within %g s", patience_s)
                patience_s *= 2
                continue
            # Ray would ask the same replica again: one that refuses is never busy.
            if taken or await self._append_everywhere(record):
                return
            raise LogUnavailable

    async def _append_all(self, records: Sequence[RequestRecord]) -> list[bool]:
        """Tell of each of `records` whether one replica, which Ray chooses, took it.

        It is told directly, else through Ray: a repeat is safe.
        """
        with suppress(LineLost):
            return await self._line.call(APPEND_ALL, list(records))

        async def append_all() -> list[bool]:
            taken: list[bool] = await self._handle.append_all.remote(records)
            return taken

        try:
            async with asyncio.timeout(_CALL_TIMEOUT_S):
                return await until_answered(append_all, LogUnavailable, LogUnavailable)
        except LogUnavailable:
            return [False] * len(records)

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

        async def everywhere() -> list[Any]:
            results: list[Any] = await self._handle.broadcast(method, *args).results_async(
                timeout_s=_ALL_TIMEOUT_S, return_exceptions=True
            )
            return results

        try:
            return await called(everywhere)
        except CallFailed:
            return []
