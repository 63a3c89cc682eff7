"""What a load test must have kept for it to have passed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a run saw. Times are None where nothing was measured."""

    requests: int
    failures: int
    first_token_p95_ms: float | None
    gap_p99_ms: float | None


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """The most that is allowed; None allows anything."""

    failures_percent: float = 1.0
    first_token_p95_ms: float | None = None
    gap_p99_ms: float | None = None

    def broken_by(self, seen: Measured) -> Iterator[str]:
        """Yield a sentence for each threshold that a run did not keep."""
        if seen.requests == 0:
            yield "no request was answered"
            return
        failed = 100 * seen.failures / seen.requests
        if failed > self.failures_percent:
            yield f"{failed:.2f} % of the requests failed, over {self.failures_percent:g} %"
        yield from _over(
            "time to first token, p95", seen.first_token_p95_ms, self.first_token_p95_ms
        )
        yield from _over("inter-token latency, p99", seen.gap_p99_ms, self.gap_p99_ms)


def _over(what: str, seen_ms: float | None, most_ms: float | None) -> Iterator[str]:
    if most_ms is None:
        return
    if seen_ms is None:
        yield f"{what}: nothing was measured"
    elif seen_ms > most_ms:
        yield f"{what}: {seen_ms:g} ms, over {most_ms:g} ms"
