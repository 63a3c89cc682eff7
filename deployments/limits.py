"""The counters of the limits, in one replica, so that they hold across gateways."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

from ray import serve

from serve_app.contracts import Allowance, ReservationRequest
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
        self._book = LimitBook(time.monotonic)

    async def reserve(self, request: ReservationRequest) -> Allowance:
        """See `LimitBook.reserve`."""
        return self._book.reserve(request)

    async def settle(self, reservation_id: uuid.UUID) -> None:
        """See `LimitBook.settle`."""
        self._book.settle(reservation_id)

    async def renew(self, held: Sequence[tuple[uuid.UUID, str]]) -> None:
        """See `LimitBook.renew`; also drops what has expired."""
        self._book.renew(held)
        self._book.sweep()
