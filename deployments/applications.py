"""What Serve says of its applications, read so that one bad reading is not believed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatus,
    DeploymentStatusOverview,
    ReplicaState,
    ServeStatus,
)

from serve_app.contracts import ModelState

logger = logging.getLogger(__name__)

Applications = Mapping[str, ApplicationStatusOverview]

# Shorter than it takes to start a replica, so that a state is never missed by it.
_FRESH_S = 1.0
_ANSWER_S = 2.0
# A controller that restarts is back within this; until then the last reading stands.
_STALE_S = 15.0


class StatusUnknown(Exception):
    """Serve's status could not be read for longer than the last reading is good for."""


class ServedApplications:
    """Asks Serve for the state of its applications, once for all who want to know.

    A reading can fail while all is well: Serve reports no applications at all when its
    controller could not be looked up, and what it reports is sometimes not valid by its own
    schema while it changes. Such a reading is dropped. And while an application is built anew,
    or where that failed, Serve does not speak of its deployments, which go on as they are.
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
        self._asked: asyncio.Task[ServeStatus] | None = None

    async def get(self) -> Applications:
        """Return the applications by name.

        Raises:
            StatusUnknown: Serve does not answer.
        """
        if self._age_s() > _FRESH_S:
            await self._refresh()
        if self._age_s() > _STALE_S:
            raise StatusUnknown
        return self._known

    def _age_s(self) -> float:
        return self._clock_s() - self._known_at_s

    async def _refresh(self) -> None:
        if self._asked is None:
            # It asks the controller and blocks for the answer, for as long as the head is away.
            asking = asyncio.to_thread(self._read)
            self._asked = asyncio.create_task(asking, name="read-applications")
            self._asked.add_done_callback(self._answered)
        # All who want to know wait for the one question, and not for ever.
        await asyncio.wait([self._asked], timeout=_ANSWER_S)

    def _answered(self, asked: asyncio.Task[ServeStatus]) -> None:
        self._asked = None
        if asked.cancelled():
            return
        try:
            status = asked.result()
        except (RayError, RayServeException, ValueError) as error:
            logger.warning("no status of the applications: %s", type(error).__name__)
            return
        if not status.applications:
            # We run inside one of them, so there is one at least.
            logger.warning("no status of the applications: empty")
            return
        self._known = {
            name: _completed(app, self._known.get(name))
            for name, app in status.applications.items()
        }
        self._known_at_s = self._clock_s()


def _completed(
    app: ApplicationStatusOverview, before: ApplicationStatusOverview | None
) -> ApplicationStatusOverview:
    """Return `app` with the deployments that it had, where nothing is said of them."""
    built = (ApplicationStatus.DEPLOYING, ApplicationStatus.DEPLOY_FAILED)
    if before is None or app.deployments or app.status not in built:
        return app
    return replace(app, deployments=before.deployments)


def state_of(app: ApplicationStatusOverview | None) -> ModelState:
    """Return how a model is whose application Serve describes so; None is none."""
    if app is None or app.status is ApplicationStatus.DELETING:
        return ModelState.ABSENT
    # While it is built for the first time, an application has no deployments yet. One that
    # failed later may go on as it was.
    if not app.deployments:
        failed = app.status is ApplicationStatus.DEPLOY_FAILED
        return ModelState.FAILED if failed else ModelState.STARTING
    states = {_state_of(deployment) for deployment in app.deployments.values()}
    return max(states, key=_FROM_BEST_TO_WORST.index)


_FROM_BEST_TO_WORST = (
    ModelState.SERVING,
    ModelState.ASLEEP,
    ModelState.STARTING,
    ModelState.FAILED,
)
_FAILED = (DeploymentStatus.UNHEALTHY, DeploymentStatus.DEPLOY_FAILED)


def _state_of(deployment: DeploymentStatusOverview) -> ModelState:
    states = deployment.replica_states
    if states.get(ReplicaState.RUNNING, 0) > 0:
        return ModelState.SERVING
    if deployment.status in _FAILED:
        return ModelState.FAILED
    # Without any replica and healthy it is scaled to zero: the next request starts one.
    asleep = not states and deployment.status is DeploymentStatus.HEALTHY
    return ModelState.ASLEEP if asleep else ModelState.STARTING
