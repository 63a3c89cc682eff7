"""The counters of the limits, in one replica, so that they hold across gateways."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Sequence

from ray import serve
from ray.util.metrics import Gauge

from serve_app.contracts import Allowance, LimitState, Reservation, Scope, Settlement
from serve_app.errors import LimitsUnavailable
from serve_app.lazy_pool import build_pool
from serve_app.limits.journal import Journal
from serve_app.limits.keeping import LimitKeeping
from serve_app.limits.usage_store import UsageStore
from serve_app.log_setup import log_as_json
from serve_app.settings import load_settings


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
class Limits:
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

    async def reserve(self, reservation: Reservation) -> Allowance:
        """See `LimitKeeping.reserve`."""
        return await self._limits.reserve(reservation)

    async def settle(self, settlement: Settlement) -> None:
        """See `LimitKeeping.settle`."""
        await self._limits.settle(settlement)

    async def renew(self, held: Sequence[uuid.UUID]) -> list[uuid.UUID]:
        """See `LimitKeeping.renew`."""
        return await self._limits.renew(held)

    async def adopt(self, held: Sequence[Settlement]) -> None:
        """See `LimitKeeping.adopt`."""
        await self._limits.adopt(held)

    async def standing(self, scopes: Sequence[Scope]) -> list[LimitState]:
        """See `LimitKeeping.standing`."""
        return await self._limits.standing(scopes)

    async def check_health(self) -> None:
        """Raise LimitsBroken where the limits are kept no more: Serve then replaces us."""
        self._limits.check()

    async def __del__(self) -> None:
        """Called by Serve when the replica stops."""
        await self._limits.close()
