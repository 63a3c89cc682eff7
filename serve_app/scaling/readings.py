"""What a replica tells the autoscaler of itself."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

from serve_app.engine_counters import EngineCounters

WINDOW_S = 30.0
_QUANTILE = 0.9
# Of fewer first tokens a quantile says more of one prompt than of the load.
_ENOUGH = 10

Clock = Callable[[], float]


class FirstTokens:
    """When requests were begun, and how long those that stream took to their first token."""

    def __init__(self, clock_s: Clock = time.monotonic) -> None:
        self._clock_s = clock_s
        self._begun: deque[tuple[float, float | None]] = deque()

    def note(self, after_s: float | None) -> None:
        """Note a request that was begun; None where its first token cannot be told apart."""
        self._begun.append((self._clock_s(), after_s))
        self._forget()

    def per_s(self) -> float:
        """Return how many were begun per second in the window."""
        self._forget()
        return len(self._begun) / WINDOW_S

    def quantile_s(self) -> float:
        """Return the p90 of the window; 0 where there were too few to tell."""
        self._forget()
        waits_s = sorted(after_s for _, after_s in self._begun if after_s is not None)
        if len(waits_s) < _ENOUGH:
            return 0.0
        return waits_s[math.ceil(_QUANTILE * len(waits_s)) - 1]

    def _forget(self) -> None:
        oldest_s = self._clock_s() - WINDOW_S
        while self._begun and self._begun[0][0] <= oldest_s:
            self._begun.popleft()


class LoadReadings:
    """The figures of one replica by name, as `deployments.scaling` reads them."""

    def __init__(self, first_tokens: FirstTokens, clock_s: Clock = time.monotonic) -> None:
        self._first_tokens = first_tokens
        self._clock_s = clock_s
        self._read_at_s = clock_s()
        self._tokens = 0

    def read(self, counters: EngineCounters) -> dict[str, float]:
        """Return what is so now, and the tokens per second since the last reading."""
        now_s, tokens = self._clock_s(), counters.prompt_tokens + counters.completion_tokens
        passed_s, more = now_s - self._read_at_s, tokens - self._tokens
        self._read_at_s, self._tokens = now_s, tokens
        return {
            "waiting": float(counters.requests_waiting),
            "begun_per_s": self._first_tokens.per_s(),
            "first_token_s": self._first_tokens.quantile_s(),
            "tokens_per_s": more / passed_s if passed_s > 0 else 0.0,
        }
