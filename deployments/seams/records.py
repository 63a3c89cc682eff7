"""Records, appended at the replicas of the RequestLog deployment."""

from __future__ import annotations

import asyncio
import logging

from ray.serve.handle import DeploymentHandle

from deployments.seams.calls import CALL_FAILED, answers, until_answered
from serve_app.errors import LogUnavailable
from serve_app.records import RequestRecord

logger = logging.getLogger(__name__)

# An append takes milliseconds. One that takes longer than this is tried elsewhere.
_PATIENCE_FIRST_S = 5.0
_ALL_TIMEOUT_S = 5.0


class RayRecordSink:
    """Appends records at the RequestLog deployment."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

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
        try:
            results = await self._handle.broadcast("append", record).results_async(
                timeout_s=_ALL_TIMEOUT_S, return_exceptions=True
            )
        except (*CALL_FAILED, TimeoutError):
            return False
        return any(not isinstance(result, BaseException) for result in results)

    async def works(self) -> bool:
        """Tell whether records can be taken now."""
        return await answers(self._handle.status.remote())
