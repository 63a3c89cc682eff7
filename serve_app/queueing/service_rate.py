"""How fast slots come free, so that who is refused learns when to come again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

# The last 64 closings or so count.
_KEEP = 1 - 1 / 64
# A shorter wait is no advice, and who waits longer than this should ask again anyway.
LEAST_RETRY_AFTER_S = 1.0
MOST_RETRY_AFTER_S = 600.0


class ServiceRate:
    """Leases closed per second, exponentially weighted by closings.

    It is the number of leases held now, over the mean time that one was held. So an idle hour
    says nothing of the speed, what was measured with a few leases holds for many, and leases
    that are held for longer than is usual lower it before they end.
    """

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._held = 0
        self._sum_of_starts_s = 0.0
        self._closings = 0.0
        self._held_s = 0.0

    @property
    def held(self) -> int:
        """Leases that are held now."""
        return self._held

    def opened(self) -> float:
        """Note that a lease began; return when, for `closed`."""
        now_s = self._clock_s()
        self._held += 1
        self._sum_of_starts_s += now_s
        return now_s

    def closed(self, opened_at_s: float) -> None:
        """Note that a lease ended."""
        self._held -= 1
        self._sum_of_starts_s -= opened_at_s
        self._closings = self._closings * _KEEP + 1
        self._held_s = self._held_s * _KEEP + self._clock_s() - opened_at_s

    def per_s(self) -> float | None:
        """Return the rate at which slots come free now; None before the first one did."""
        if not self._closings:
            return None
        usual_s = self._held_s / self._closings
        ages_s = self._held * self._clock_s() - self._sum_of_starts_s
        overdue_s = max(0.0, ages_s - self._held * usual_s)
        mean_s = (self._held_s + overdue_s) / self._closings
        return max(1, self._held) / mean_s if mean_s else math.inf


def retry_after_s(ahead: int, rate_per_s: float | None, unmeasured_s: float) -> float:
    """Return the seconds until one with `ahead` before it is served, within sensible bounds.

    Args:
        ahead: how many are served first.
        rate_per_s: services a second; None where nothing was measured yet.
        unmeasured_s: what to say then.
    """
    seconds = unmeasured_s if rate_per_s is None else (ahead + 1) / rate_per_s
    return min(max(seconds, LEAST_RETRY_AFTER_S), MOST_RETRY_AFTER_S)
