"""Limits, kept at the Limits deployment."""

from __future__ import annotations

import asyncio
import logging
import uuid
from typing import Any

from ray.serve.handle import DeploymentHandle

from deployments.seams.calls import answers, until_answered
from serve_app.config import LimitPolicy
from serve_app.contracts import Allowance, ReservationRequest
from serve_app.errors import LimitsUnavailable

logger = logging.getLogger(__name__)

_RENEW_EVERY_S = 5.0
_RESERVE_TIMEOUT_S = 10.0
_SETTLE_TIMEOUT_S = 1.0


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
        async def reserve() -> Allowance:
            allowance: Allowance = await self._handle.reserve.remote(request)
            return allowance

        try:
            async with asyncio.timeout(_RESERVE_TIMEOUT_S):
                return await until_answered(reserve, LimitsUnavailable, LimitsUnavailable)
        except TimeoutError:
            raise LimitsUnavailable(retry_after_s=_RESERVE_TIMEOUT_S) from None

    async def settle(self, reservation_id: uuid.UUID) -> None:
        """See `LimitKeeper.settle`. Gives up early: what is not renewed ends by itself."""
        self._held.pop(reservation_id, None)
        await answers(self._handle.settle.remote(reservation_id), _SETTLE_TIMEOUT_S)

    async def works(self) -> bool:
        """Tell whether the counters answer."""
        return await answers(self._tell())

    async def _renew(self) -> None:
        while True:
            if not await answers(self._tell()):
                logger.warning("limits did not answer")
            await asyncio.sleep(_RENEW_EVERY_S)

    def _tell(self) -> Any:
        return self._handle.renew.remote(list(self._held.items()))
