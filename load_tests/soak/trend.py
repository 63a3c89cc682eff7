"""Whether a figure grows over time: its slope, and how much of one counts as flat."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_HOUR_S = 3600.0
_MIB = 2**20
# A part that is there only now and then, as a worker that Ray keeps idle, has no trend.
_SEEN = 0.5
# Of the normal distribution: 95 % lie within as many deviations.
_NORMAL_95 = 1.96

# What was seen at one time: by part, by figure.
Figures = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Bound:
    """The most that a figure may grow in an hour: an amount, or a part of what it is."""

    amount: float
    part: float = 0.0

    def of(self, level: float) -> float:
        """Return the bound of a figure that is at `level`."""
        return max(self.amount, self.part * level)


# A leak of one file in 20,000 requests is more than 4 in an hour.
BOUNDS: Mapping[str, Bound] = {
    "memory_bytes": Bound(4 * _MIB, 0.02),
    "files": Bound(4),
    # A pool of threads makes one more when all are busy, until it has six.
    "threads": Bound(4),
    "bytes": Bound(1 * _MIB),
    "records": Bound(2),
    "held": Bound(2),
    "sessions": Bound(1),
    "relations": Bound(1),
}


@dataclass(frozen=True, kw_only=True)
class Trend:
    """How one figure of one part went, after the warm-up."""

    part: str
    figure: str
    first: float
    last: float
    slope_an_hour: float
    least_an_hour: float
    bound_an_hour: float

    @property
    def flat(self) -> bool:
        """Whether it grew by no more than its bound allows, or by no more than chance does.

        Connections and reservations come and go with the requests, so that what is counted of them
        in one moment differs from the next by half.
        """
        return self.slope_an_hour <= self.bound_an_hour or self.least_an_hour <= 0

    def __str__(self) -> str:
        slope, bound = (amount(self.figure, x) for x in (self.slope_an_hour, self.bound_an_hour))
        return f"{self.part}, {self.figure.removesuffix('_bytes')}: {slope} an hour, over {bound}"


def amount(figure: str, value: float) -> str:
    """Return an amount of a figure for a reader."""
    return f"{value / _MIB:.2f} MiB" if figure.endswith("bytes") else f"{value:.2f}"


def slopes_an_hour(times_s: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Return the Theil-Sen slope, and the lower end of the interval that holds it 19 times in 20.

    The slope is the median of the slopes between all pairs: up to 29 % of the samples may be
    anything at all without moving it. The interval is that of P. K. Sen, "Estimates of the
    regression coefficient based on Kendall's tau" (1968), section 4, without his term for ties,
    which makes it wider than it need be for counts. It takes each sample for independent of the one
    before, which memory is not; for that there are bounds. Needs two times.
    """
    points = list(zip(times_s, values, strict=True))
    slopes = sorted(
        (later - sooner) / (then - now)
        for (now, sooner), (then, later) in itertools.combinations(points, 2)
    )
    samples = len(points)
    deviation = math.sqrt(samples * (samples - 1) * (2 * samples + 5) / 18)
    rank = max(0, math.floor((len(slopes) - _NORMAL_95 * deviation) / 2))
    return _HOUR_S * statistics.median(slopes), _HOUR_S * slopes[rank]


def trends(times_s: Sequence[float], seen: Sequence[Figures]) -> list[Trend]:
    """Return how each figure of each part went; needs two samples."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for at_s, parts in zip(times_s, seen, strict=True):
        for part, figures in parts.items():
            for figure, value in figures.items():
                found.setdefault((part, figure), []).append((at_s, value))
    least = max(2.0, _SEEN * len(times_s))
    return [_trend(*key, points) for key, points in found.items() if len(points) >= least]


def _trend(part: str, figure: str, points: Sequence[tuple[float, float]]) -> Trend:
    times_s, values = zip(*points, strict=True)
    tenth = max(1, len(values) // 10)
    slope, least = slopes_an_hour(times_s, values)
    return Trend(
        part=part,
        figure=figure,
        first=statistics.median(values[:tenth]),
        last=statistics.median(values[-tenth:]),
        slope_an_hour=slope,
        least_an_hour=least,
        bound_an_hour=BOUNDS[figure].of(statistics.median(values)),
    )
