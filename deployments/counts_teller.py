"""A model replica tells the request log what its engine counted. Never on a request's path."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.seams.calls import CallFailed, called
from serve_app.accounts.drift import EngineReading
from serve_app.background import stop_tasks
from serve_app.engine_counters import EngineCounters
from serve_app.records import utc_now

logger = logging.getLogger(__name__)

_EVERY_S = 15.0
_TIMEOUT_S = 5.0
# The replica is waited for.
_LAST_TIMEOUT_S = 2.0
_REQUEST_LOG = "RequestLog"


class CountsTeller:
    """Tells the counters of this replica every few seconds, and once more at its end.

    What cannot be told is left: the counters only grow, so the next reading has it all.
    """

    def __init__(self, model: str, counters: Callable[[], Awaitable[EngineCounters]]) -> None:
        self._model = model
        self._counters = counters
        self._started_at = utc_now()
        self._handle: DeploymentHandle | None = None
        self._telling: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to tell."""
        self._telling = asyncio.create_task(self._tell_for_ever(), name="tell-engine-counts")

    async def close(self) -> None:
        """Tell a last time, then stop. Takes no longer than a moment."""
        if self._telling is not None:
            await stop_tasks(self._telling)
            await self._tell(_LAST_TIMEOUT_S)

    async def _tell_for_ever(self) -> None:
        while True:
            await asyncio.sleep(_EVERY_S)
            await self._tell(_TIMEOUT_S)

    async def _tell(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                if self._handle is None:
                    self._handle = await called(asyncio.to_thread, _request_log)
                # Read first, then dated: what it counts had happened by then.
                counters = await self._counters()
                reading = EngineReading(
                    model=self._model,
                    started_at=self._started_at,
                    at=utc_now(),
                    counters=counters,
                )
                if self._handle is not None:
                    await called(self._handle.engine_counted.remote, reading)
        except (CallFailed, TimeoutError, ValueError) as error:
            self._handle = None
            cause = error.__cause__ or error
            logger.info("engine counts were not told: %s", type(cause).__name__)


def _request_log() -> DeploymentHandle | None:
    """Return the way to the request log, whatever its application is called; it may be away."""
    for name, app in serve.status().applications.items():
        if _REQUEST_LOG in app.deployments:
            return serve.get_deployment_handle(_REQUEST_LOG, app_name=name)
    return None
