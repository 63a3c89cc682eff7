"""Limits, kept at the Limits deployment."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from ray.serve.handle import DeploymentHandle

from deployments.seams.calls import CALL_FAILED, answers, until_answered
from serve_app.contracts import (
    Allowance,
    LimitState,
    Reservation,
    Scope,
    Settlement,
    Spent,
)
from serve_app.errors import LimitsUnavailable

logger = logging.getLogger(__name__)

_RENEW_EVERY_S = 5.0
# In an update the next replica starts beside several others, on a machine that serves.
_RESERVE_TIMEOUT_S = 30.0
# What those who waited in vain are told.
_RETRY_AFTER_S = 10.0
_SETTLE_TIMEOUT_S = 1.0
# Told again at once after an outage; more come with the next renewals.
_MOST_SETTLED_AT_ONCE = 1000

Answer = TypeVar("Answer")


class RayLimitKeeper:
    """Reserves and settles at the Limits deployment."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._held: dict[uuid.UUID, Settlement] = {}
        # Settled here, and not yet known to be settled over there.
        self._settling: dict[uuid.UUID, Settlement] = {}
        self._renewing: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to tell the Limits deployment what is held here."""
        self._renewing = asyncio.create_task(self._renew(), name="renew-limits")

    async def close(self) -> None:
        """Stop telling; what is still held here is given up when it times out."""
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.wait([self._renewing])

    async def reserve(self, reservation: Reservation) -> Allowance:
        """See `LimitKeeper.reserve`."""

        async def reserve() -> Allowance:
            allowance: Allowance = await self._handle.reserve.remote(reservation)
            return allowance

        allowance = await _in_time(reserve)
        if allowance.refusal is None:
            self._held[reservation.id] = _settlement(reservation, reservation.most)
        return allowance

    async def settle(self, reservation: Reservation, spent: Spent) -> None:
        """See `LimitKeeper.settle`. Gives up early, and tells it again with the next renewals."""
        self._held.pop(reservation.id, None)
        settlement = _settlement(reservation, spent)
        self._settling[reservation.id] = settlement
        if await answers(self._handle.settle.remote(settlement), _SETTLE_TIMEOUT_S):
            self._settling.pop(reservation.id, None)

    async def standing(self, scopes: Sequence[Scope]) -> list[LimitState]:
        """See `LimitKeeper.standing`."""

        async def standing() -> list[LimitState]:
            states: list[LimitState] = await self._handle.standing.remote(scopes)
            return states

        return await _in_time(standing)

    async def works(self) -> bool:
        """Tell whether the counters answer."""
        return await answers(self._handle.renew.remote([]))

    async def _renew(self) -> None:
        while True:
            try:
                async with asyncio.timeout(_RENEW_EVERY_S):
                    await self._tell()
            except (*CALL_FAILED, TimeoutError):
                logger.warning("limits did not answer")
            await asyncio.sleep(_RENEW_EVERY_S)

    async def _tell(self) -> None:
        for settlement in list(self._settling.values())[:_MOST_SETTLED_AT_ONCE]:
            await self._handle.settle.remote(settlement)
            self._settling.pop(settlement.id, None)
        unknown = await self._handle.renew.remote(list(self._held))
        if told := [self._held[one] for one in unknown if one in self._held]:
            await self._handle.adopt.remote(told)


async def _in_time(call: Callable[[], Awaitable[Answer]]) -> Answer:
    try:
        async with asyncio.timeout(_RESERVE_TIMEOUT_S):
            return await until_answered(call, LimitsUnavailable, LimitsUnavailable)
    except TimeoutError:
        raise LimitsUnavailable(retry_after_s=_RETRY_AFTER_S) from None


def _settlement(reservation: Reservation, spent: Spent) -> Settlement:
    accounts = tuple(scope.key for scope in reservation.scopes)
    return Settlement(id=reservation.id, accounts=accounts, spent=spent)
