"""Limits, kept at the Limits deployment."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from ray.serve.handle import DeploymentHandle

from deployments.seams.calls import CallFailed, CallsBroken, answers, called, until_answered
from deployments.seams.direct import line_to
from serve_app.background import check_goes_on, stop_tasks
from serve_app.contracts import (
    Allowance,
    LimitState,
    Reservation,
    Scope,
    Settlement,
    Spent,
)
from serve_app.direct import LineLost
from serve_app.errors import LimitsUnavailable
from serve_app.grouped_calls import GroupedCalls
from serve_app.limits.procedures import RESERVE_ALL, SETTLE_ALL

logger = logging.getLogger(__name__)

_RENEW_EVERY_S = 5.0
# In an update the next replica starts beside several others, on a machine that serves.
_RESERVE_TIMEOUT_S = 30.0
# What those who waited in vain are told.
_RETRY_AFTER_S = 10.0
_SETTLE_TIMEOUT_S = 1.0
_WORKS_TIMEOUT_S = 5.0
# Told again at once after an outage; more come with the next renewals.
_MOST_SETTLED_AT_ONCE = 1000
# Requests that go with one call.
_MOST_IN_A_CALL = 64

Answer = TypeVar("Answer")


class RayLimitKeeper:
    """Reserves and settles at the Limits deployment."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._line = line_to(handle)
        self._held: dict[uuid.UUID, Settlement] = {}
        # Settled here, and not yet known to be settled over there.
        self._settling: dict[uuid.UUID, Settlement] = {}
        self._renewing: asyncio.Task[None] | None = None
        self._reserving = GroupedCalls(self._reserve_all, most=_MOST_IN_A_CALL)
        self._settlements = GroupedCalls(self._settle_all, most=_MOST_IN_A_CALL)

    def start(self) -> None:
        """Begin to tell the Limits deployment what is held here."""
        self._line.start()
        self._renewing = asyncio.create_task(self._renew(), name="renew-limits")

    async def close(self) -> None:
        """Stop telling; what is still held here is given up when it times out."""
        await stop_tasks(self._renewing)
        await self._line.close()

    def check(self) -> None:
        """Raise CallsBroken where the Limits deployment is told nothing more."""
        if self._renewing is not None:
            check_goes_on(self._renewing, "The limits are told of nothing more", CallsBroken)

    async def reserve(self, reservation: Reservation) -> Allowance:
        """See `LimitKeeper.reserve`."""
        allowance = await self._reserving.ask(reservation)
        if isinstance(allowance, LimitsUnavailable):
            raise allowance
        if allowance.refusal is None:
            self._held[reservation.id] = _settlement(reservation, reservation.most)
        return allowance

    async def settle(self, reservation: Reservation, spent: Spent) -> None:
        """See `LimitKeeper.settle`. Gives up early, and tells it again with the next renewals."""
        self._held.pop(reservation.id, None)
        settlement = _settlement(reservation, spent)
        self._settling[reservation.id] = settlement
        if await self._settlements.ask(settlement):
            self._settling.pop(reservation.id, None)

    async def _reserve_all(
        self, reservations: Sequence[Reservation]
    ) -> list[Allowance | LimitsUnavailable]:
        """Reserve directly, else through Ray: both are the same book, and a repeat is safe."""
        with suppress(LineLost):
            allowed = await self._line.call(RESERVE_ALL, list(reservations))
            return [one.answer for one in allowed]

        async def reserve_all() -> list[Allowance | LimitsUnavailable]:
            allowances: list[Allowance | LimitsUnavailable]
            allowances = await self._handle.reserve_all.remote(reservations)
            return allowances

        return await _in_time(reserve_all)

    async def _settle_all(self, settlements: Sequence[Settlement]) -> list[bool]:
        with suppress(LineLost):
            return [await self._line.call(SETTLE_ALL, list(settlements))] * len(settlements)
        settled = await answers(
            self._handle.settle_all.remote, settlements, timeout_s=_SETTLE_TIMEOUT_S
        )
        return [settled] * len(settlements)

    async def standing(self, scopes: Sequence[Scope]) -> list[LimitState]:
        """See `LimitKeeper.standing`."""

        async def standing() -> list[LimitState]:
            states: list[LimitState] = await self._handle.standing.remote(scopes)
            return states

        return await _in_time(standing)

    async def works(self) -> bool:
        """Tell whether the counters answer."""
        try:
            async with asyncio.timeout(_WORKS_TIMEOUT_S):
                await self.standing([])
        except (LimitsUnavailable, TimeoutError):
            return False
        return True

    async def _renew(self) -> None:
        while True:
            try:
                async with asyncio.timeout(_RENEW_EVERY_S):
                    await self._tell()
            except (CallFailed, TimeoutError):
                logger.warning("limits did not answer")
            await asyncio.sleep(_RENEW_EVERY_S)

    async def _tell(self) -> None:
        if again := list(self._settling.values())[:_MOST_SETTLED_AT_ONCE]:
            await called(self._handle.settle_all.remote, again)
            for settlement in again:
                self._settling.pop(settlement.id, None)
        unknown = await called(self._handle.renew.remote, list(self._held))
        if told := [self._held[one] for one in unknown if one in self._held]:
            await called(self._handle.adopt.remote, told)


async def _in_time(call: Callable[[], Awaitable[Answer]]) -> Answer:
    try:
        async with asyncio.timeout(_RESERVE_TIMEOUT_S):
            return await until_answered(call, LimitsUnavailable, LimitsUnavailable)
    except TimeoutError:
        raise LimitsUnavailable(retry_after_s=_RETRY_AFTER_S) from None


def _settlement(reservation: Reservation, spent: Spent) -> Settlement:
    accounts = tuple(scope.key for scope in reservation.scopes)
    return Settlement(id=reservation.id, accounts=accounts, spent=spent)
