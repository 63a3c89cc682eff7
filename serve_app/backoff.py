"""How long to wait after failures: longer each time, and not the same for everybody."""

from __future__ import annotations

import random
from collections.abc import Callable


class Backoff:
    """Waits that double from `first_s` to `most_s`, each shortened by up to a half at random.

    With the jitter, those who failed together do not all come back together.
    """

    def __init__(
        self,
        first_s: float,
        most_s: float,
        *,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._first_s = first_s
        self._most_s = most_s
        self._uniform = uniform
        self._longest_s = first_s

    def next_s(self) -> float:
        """Return how long to wait after one more failure."""
        longest_s = self._longest_s
        self._longest_s = min(longest_s * 2, self._most_s)
        return self._uniform(longest_s / 2, longest_s)

    def reset(self) -> None:
        """Begin anew: it works again."""
        self._longest_s = self._first_s
