"""The counters of the limits, in one replica, so that they hold across gateways."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

from ray import serve

from serve_app.contracts import Allowance, LimitState, Reservation, Scope, Settlement
from serve_app.limits.book import LimitBook


@serve.deployment(
    ray_actor_options={"num_cpus": 0.1},
    max_ongoing_requests=10_000,
    # While it is away nobody is served: a dead replica is to be found soon.
    health_check_period_s=2,
    health_check_timeout_s=10,
)
class Limits:
    """A LimitBook behind Serve. Every method is one step without waiting, so calls are atomic."""

    def __init__(self) -> None:
        self._book = LimitBook(time.monotonic, time.time)

    async def reserve(self, reservation: Reservation) -> Allowance:
        """See `LimitBook.reserve`."""
        return self._book.reserve(reservation)

    async def settle(self, settlement: Settlement) -> None:
        """See `LimitBook.settle`."""
        self._book.settle(settlement)

    async def renew(self, held: Sequence[uuid.UUID]) -> list[uuid.UUID]:
        """See `LimitBook.renew`; also drops what has expired."""
        unknown = self._book.renew(held)
        self._book.sweep()
        return unknown

    async def adopt(self, reservations: Sequence[Settlement]) -> None:
        """See `LimitBook.adopt`."""
        for one in reservations:
            self._book.adopt(one.id, one.accounts, one.spent)

    async def standing(self, scopes: Sequence[Scope]) -> list[LimitState]:
        """See `LimitBook.standing`."""
        return self._book.standing(scopes)
