"""The gateway's seams (`serve_app.contracts`) joined to Ray Serve.

Foreign errors are mapped here, once: nothing of Ray gets past this file.
"""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from ray.serve.schema import DeploymentStatus, DeploymentStatusOverview, ReplicaState

from deployments.applications import ServedApplications, StatusUnknown
from serve_app.config import LimitPolicy, ModelEntry
from serve_app.contracts import Allowance, Lease, LeaseGrant, LeaseHint, ReservationRequest
from serve_app.errors import (
    LimitsUnavailable,
    LogUnavailable,
    ModelNotReady,
    ModelOverloaded,
    RequestError,
)
from serve_app.records import RequestRecord

logger = logging.getLogger(__name__)

_RENEW_EVERY_S = 5.0
_RESERVE_TIMEOUT_S = 10.0
_SETTLE_TIMEOUT_S = 1.0
_RETRY_FIRST_S = 0.05
_RETRY_MOST_S = 1.0


class RayRecordSink:
    """Appends records at the RequestLog deployment."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def append(self, record: RequestRecord) -> None:
        """See `RecordSink.append`. Tries again, until cancelled, while the replica is away.

        A repeat is safe because the log knows a record by its id. The caller sets the time.
        """
        async for attempt in _attempts():
            async with attempt(LogUnavailable, LogUnavailable):
                await self._handle.append.remote(record)
                return

    async def works(self) -> bool:
        """Tell whether records can be taken now."""
        return await _answers(self._handle.status.remote())


class RayLimitKeeper:
    """Reserves and settles at the Limits deployment."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._held: dict[uuid.UUID, str] = {}
        self._renewing: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to tell the Limits deployment what is held here."""
        self._renewing = asyncio.create_task(self._renew(), name="renew-limits")

    async def close(self) -> None:
        """Stop telling; what is still held here is given back when it times out."""
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.wait([self._renewing])

    async def reserve(
        self, reservation_id: uuid.UUID, principal_id: str, policy: LimitPolicy
    ) -> Allowance:
        """See `LimitKeeper.reserve`."""
        request = ReservationRequest(id=reservation_id, principal_id=principal_id, policy=policy)
        allowance = await self._reserve(request)
        if allowance.refusal is None:
            self._held[reservation_id] = principal_id
        return allowance

    async def _reserve(self, request: ReservationRequest) -> Allowance:
        try:
            async with asyncio.timeout(_RESERVE_TIMEOUT_S):
                async for attempt in _attempts():
                    async with attempt(LimitsUnavailable, LimitsUnavailable):
                        allowance: Allowance = await self._handle.reserve.remote(request)
                        return allowance
        except TimeoutError:
            pass
        raise LimitsUnavailable(retry_after_s=_RESERVE_TIMEOUT_S)

    async def settle(self, reservation_id: uuid.UUID) -> None:
        """See `LimitKeeper.settle`. Gives up early: what is not renewed ends by itself."""
        self._held.pop(reservation_id, None)
        await _answers(self._handle.settle.remote(reservation_id), _SETTLE_TIMEOUT_S)

    async def works(self) -> bool:
        """Tell whether the counters answer."""
        return await _answers(self._tell())

    async def _renew(self) -> None:
        while True:
            if not await _answers(self._tell()):
                logger.warning("limits did not answer")
            await asyncio.sleep(_RENEW_EVERY_S)

    def _tell(self) -> Any:
        return self._handle.renew.remote(list(self._held.items()))


class RayLease:
    """A lease held open by a streaming handle call."""

    def __init__(self, grant: LeaseGrant, call: DeploymentResponseGenerator) -> None:
        self._grant = grant
        self._call = call

    @property
    def grant(self) -> LeaseGrant:
        """Where and with what to ask."""
        return self._grant

    def close(self) -> None:
        """See `Lease.close`."""
        self._call.cancel()


class RayModelPool:
    """Opens leases at the models' Serve applications."""

    def __init__(self) -> None:
        self._handles: dict[str, DeploymentHandle] = {}
        self._applications = ServedApplications()

    async def open(self, model: ModelEntry, hint: LeaseHint) -> Lease:
        """See `ModelPool.open`."""
        handle = await self._handle(model.app)
        async for attempt in _attempts():
            async with attempt(ModelNotReady, ModelOverloaded):
                call = handle.lease.remote(hint)
                try:
                    return RayLease(await anext(call), call)
                except BaseException:
                    # Also when cancelled: a slot that was granted meanwhile is given back.
                    call.cancel()
                    raise
        raise ModelNotReady

    async def ready(self, model: ModelEntry) -> bool:
        """See `ModelPool.ready`."""
        try:
            app = (await self._applications.get()).get(model.app)
        except StatusUnknown:
            return False
        # While it is being built, an application has no deployments yet.
        if app is None or not app.deployments:
            return False
        return all(_serves(d) for d in app.deployments.values())

    async def _handle(self, app: str) -> DeploymentHandle:
        if app not in self._handles:
            try:
                # It asks the controller and blocks for the answer.
                handle = await asyncio.to_thread(serve.get_app_handle, app)
            except RayServeException as error:
                raise ModelNotReady from error
            self._handles[app] = handle.options(stream=True)
        return self._handles[app]


def _serves(deployment: DeploymentStatusOverview) -> bool:
    states = deployment.replica_states
    # Without any replica and healthy it is scaled to zero: the next request starts one.
    asleep = not states and deployment.status is DeploymentStatus.HEALTHY
    return asleep or states.get(ReplicaState.RUNNING, 0) > 0


async def _attempts() -> AsyncIterator[Any]:
    """Yield tries without end, with growing pauses in between; the caller sets the time."""
    pause_s = _RETRY_FIRST_S
    while True:
        yield _attempt
        await asyncio.sleep(pause_s * random.uniform(0.5, 1))  # noqa: S311
        pause_s = min(pause_s * 2, _RETRY_MOST_S)


@asynccontextmanager
async def _attempt(
    unavailable: type[RequestError], overloaded: type[RequestError]
) -> AsyncIterator[None]:
    """Let a lost replica pass, so that the loop tries again; map every other error of Ray."""
    try:
        yield
    except BackPressureError as error:
        raise overloaded(retry_after_s=1) from error
    except RequestError as error:
        # Ray raises a copy that is also its own error; the cause is the one we raised.
        raise (error.cause if isinstance(error, RayTaskError) else error) from None
    except RayTaskError as error:
        logger.error("call failed: %s", type(error.cause).__name__)
        raise unavailable() from None
    except (RayError, RayServeException) as error:
        logger.warning("replica lost, trying again: %s", type(error).__name__)


async def _answers(call: Any, timeout_s: float = 5.0) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            await call
    except (RayError, RayServeException, TimeoutError):
        return False
    return True
