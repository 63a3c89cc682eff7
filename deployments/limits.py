"""The counters of the limits, in one replica, so that they hold across gateways."""

from __future__ import annotations

import asyncio
import logging
import sys
import uuid
from collections.abc import Sequence

from ray import serve
from ray.util.metrics import Gauge

from deployments.direct import Direct
from serve_app.background import check_goes_on, stop_tasks
from serve_app.contracts import Allowance, LimitState, Reservation, Scope, Settlement
from serve_app.errors import LimitsUnavailable
from serve_app.lazy_pool import build_pool
from serve_app.limits.journal import Journal
from serve_app.limits.keeping import LimitKeeping, LimitsBroken
from serve_app.limits.procedures import limit_handlers
from serve_app.limits.usage_store import UsageStore
from serve_app.log_setup import log_as_json
from serve_app.settings import load_settings

logger = logging.getLogger(__name__)


class RayLimitMetrics:
    """The counters' measurements; they come out as `ray_comp_ai_limits_…`."""

    def __init__(self) -> None:
        self._held_back = Gauge(
            "comp_ai_limits_budgets_held_back",
            description="1 while nothing is granted of a budget: what was used is not known.",
        )

    def budgets_held_back(self, held_back: bool) -> None:
        """Set the gauge."""
        self._held_back.set(int(held_back))


@serve.deployment(
    ray_actor_options={"num_cpus": 0.1},
    max_ongoing_requests=10_000,
    # While it is away nobody is served: a dead replica is to be found soon.
    health_check_period_s=2,
    health_check_timeout_s=10,
    # A line for each call would cost more than the call.
    logging_config={"enable_access_log": False},
)
class Limits(Direct):
    """`LimitKeeping` behind Serve."""

    # Serve awaits a constructor that is a coroutine.
    async def __init__(self) -> None:  # type: ignore[misc]
        """Open the journal; PostgreSQL need not be there.

        Raises:
            ConfigError: a setting is wrong, or the journal cannot be opened.
        """
        log_as_json(sys.stdout)
        settings = load_settings()
        pool = build_pool(
            settings.postgres,
            application_name="comp-ai-limits",
            max_size=1,
            unavailable=LimitsUnavailable,
            name="limits",
        )
        journal = Journal(settings.service.home_path / "limits")
        self._limits = LimitKeeping(journal, UsageStore(pool), RayLimitMetrics())
        await self._limits.start()
        handlers = limit_handlers(self.reserve_all, self.settle_all)
        await self.open_direct(handlers, settings.service)
        self._handing_over = asyncio.create_task(self._hand_over(), name="hand-over-limits")

    # The next two are for gateways of the release before, until an update has replaced them.

    async def reserve(self, reservation: Reservation) -> Allowance:
        """See `LimitKeeping.reserve`."""
        return await self._limits.reserve(reservation)

    async def settle(self, settlement: Settlement) -> None:
        """See `LimitKeeping.settle`."""
        await self._limits.settle(settlement)

    async def reserve_all(
        self, reservations: Sequence[Reservation]
    ) -> list[Allowance | LimitsUnavailable]:
        """See `LimitKeeping.reserve`; what it would raise stands in the place of its answer."""
        return await asyncio.gather(*(self._reserve(one) for one in reservations))

    async def settle_all(self, settlements: Sequence[Settlement]) -> None:
        """See `LimitKeeping.settle`. Where this raises, all of them are to be told again."""
        await asyncio.gather(*(self._limits.settle(one) for one in settlements))

    async def renew(self, held: Sequence[uuid.UUID]) -> list[uuid.UUID]:
        """See `LimitKeeping.renew`."""
        return await self._limits.renew(held)

    async def adopt(self, held: Sequence[Settlement]) -> None:
        """See `LimitKeeping.adopt`."""
        await self._limits.adopt(held)

    async def standing(self, scopes: Sequence[Scope]) -> list[LimitState]:
        """See `LimitKeeping.standing`."""
        return await self._limits.standing(scopes)

    async def _reserve(self, reservation: Reservation) -> Allowance | LimitsUnavailable:
        try:
            return await self._limits.reserve(reservation)
        except LimitsUnavailable as error:
            return error

    async def _hand_over(self) -> None:
        await self._limits.until_wanted()
        # First what gateways ask directly, so that they find their way to the successor.
        await self.close_direct()
        await self._limits.hand_over()
        logger.info("handed over", extra={"action": "limits.handed_over"})

    async def check_health(self) -> None:
        """Raise LimitsBroken where the limits are kept no more: Serve then replaces us."""
        self._limits.check()
        check_goes_on(self._handing_over, "No successor is looked for", LimitsBroken)

    async def __del__(self) -> None:
        """Called by Serve when the replica stops."""
        await stop_tasks(self._handing_over)
        await self.close_direct()
        await self._limits.close()
