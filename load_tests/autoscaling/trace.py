"""A bursty day of requests, made from published figures; no trace is downloaded.

Lengths have the medians of Azure's traces of 2023 (Patel et al., Splitwise, ISCA 2024,
arXiv:2311.18677): a conversation has 1,020 prompt tokens and 129 of answer, coding has 1,500 and
13. Their spread is assumed to be log-normal. The rate of each half minute is drawn from a Gamma
distribution, as BurstGPT (Wang et al., arXiv:2401.17644) models its bursts; the shape, the hours of
an office and the jobs that come on top are assumed.
"""

from __future__ import annotations

import bisect
import itertools
import math
from dataclasses import dataclass
from random import Random

DAY_S = 86_400.0
# Part of the busiest rate at each hour of the day.
_BY_HOUR = (
    *(0.06, 0.05, 0.04, 0.04, 0.05, 0.08, 0.15, 0.35, 0.70, 0.95, 1.00, 0.95),
    *(0.70, 0.80, 0.95, 1.00, 0.90, 0.65, 0.40, 0.30, 0.25, 0.20, 0.12, 0.08),
)
_SLICE_S = 30.0
_GAMMA_SHAPE = 4.0
_JOBS = 6
_SIGMA = 0.7
_MOST_TOKENS = 8000


@dataclass(frozen=True, slots=True)
class Request:
    """What one asks for, and when."""

    at_s: float
    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True, slots=True)
class _Job:
    begin_s: float
    end_s: float
    per_s: float


def bursty_day(seed: int, busiest_per_s: float) -> list[Request]:
    """Return the requests of a day in order; `busiest_per_s` is the mean rate at its busiest."""
    rng = Random(seed)
    jobs = [_job(rng, busiest_per_s) for _ in range(_JOBS)]
    phase = rng.uniform(0, 2 * math.pi)
    requests: list[Request] = []
    for index in range(int(DAY_S / _SLICE_S)):
        begin_s = index * _SLICE_S
        people_per_s = busiest_per_s * of_day(begin_s)
        people_per_s *= rng.gammavariate(_GAMMA_SHAPE, 1 / _GAMMA_SHAPE)
        coding = 0.5 + 0.4 * math.sin(2 * math.pi * 3 * begin_s / DAY_S + phase)
        requests += _slice(rng, begin_s, people_per_s, coding)
        jobs_per_s = sum(job.per_s for job in jobs if job.begin_s <= begin_s < job.end_s)
        requests += _slice(rng, begin_s, jobs_per_s, coding=1.0)
    return sorted(requests, key=lambda request: request.at_s)


def rate_per_s(requests: list[Request], every_s: float) -> list[float]:
    """Return how many requests per second came in each `every_s`."""
    times_s = [request.at_s for request in requests]
    edges = [bisect.bisect_left(times_s, i * every_s) for i in range(int(DAY_S / every_s) + 1)]
    return [(b - a) / every_s for a, b in itertools.pairwise(edges)]


def _job(rng: Random, busiest_per_s: float) -> _Job:
    begin_s = rng.uniform(0, DAY_S)
    length_s = rng.uniform(180, 900)
    return _Job(begin_s, begin_s + length_s, busiest_per_s * rng.uniform(0.3, 0.8))


def of_day(at_s: float) -> float:
    """Return the part of the busiest rate at a time of the day."""
    hour, part = divmod(at_s / 3600, 1)
    now, then = _BY_HOUR[int(hour)], _BY_HOUR[(int(hour) + 1) % 24]
    return now + (then - now) * part


def _slice(rng: Random, begin_s: float, per_s: float, coding: float) -> list[Request]:
    requests = []
    at_s = begin_s
    while per_s > 0 and (at_s := at_s + rng.expovariate(per_s)) < begin_s + _SLICE_S:
        prompt, answer = (1500, 13) if rng.random() < coding else (1020, 129)
        requests.append(Request(at_s, _length(rng, prompt), _length(rng, answer)))
    return requests


def _length(rng: Random, median: int) -> int:
    return max(1, min(_MOST_TOKENS, round(rng.lognormvariate(math.log(median), _SIGMA))))
