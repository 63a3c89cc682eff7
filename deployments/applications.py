"""What Serve says of its applications, read so that one bad reading is not believed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatusOverview, ServeStatus

logger = logging.getLogger(__name__)

Applications = Mapping[str, ApplicationStatusOverview]

# Shorter than it takes to start a replica, so that a state is never missed by it.
_FRESH_S = 1.0
# A controller that restarts is back within this; until then the last reading stands.
_STALE_S = 15.0


class StatusUnknown(Exception):
    """Serve's status could not be read for longer than the last reading is good for."""


class ServedApplications:
    """Asks Serve for the state of its applications, once for all who want to know.

    A reading can fail while all is well: Serve reports no applications at all when its
    controller could not be looked up, and what it reports is sometimes not valid by its own
    schema while it changes. Such a reading is dropped.
    """

    def __init__(
        self,
        read: Callable[[], ServeStatus] = serve.status,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read = read
        self._clock_s = clock_s
        self._known: Applications = {}
        self._known_at_s = float("-inf")
        self._reading = asyncio.Lock()

    async def get(self) -> Applications:
        """Return the applications by name.

        Raises:
            StatusUnknown: Serve does not answer.
        """
        async with self._reading:
            if self._age_s() > _FRESH_S:
                await self._refresh()
        if self._age_s() > _STALE_S:
            raise StatusUnknown
        return self._known

    def _age_s(self) -> float:
        return self._clock_s() - self._known_at_s

    async def _refresh(self) -> None:
        try:
            # It asks the controller and blocks for the answer.
            status = await asyncio.to_thread(self._read)
        except (RayError, RayServeException, ValueError) as error:
            logger.warning("no status of the applications: %s", type(error).__name__)
            return
        if not status.applications:
            # We run inside one of them, so there is one at least.
            logger.warning("no status of the applications: empty")
            return
        self._known, self._known_at_s = status.applications, self._clock_s()
