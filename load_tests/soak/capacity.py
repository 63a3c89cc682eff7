"""The highest rate at which first tokens still come in time: stepped up to, then held."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

_FIRST_A_SECOND = 4.0
_FACTOR = 1.5
# From 4 to some 230 a second, and one between the last two.
_STEPS = 11
_LOWER = 0.8


@dataclass(frozen=True, kw_only=True)
class Step:
    """What was seen at one rate. Kept means that the answers came, and in time."""

    a_second: float
    asked: int
    failures: int
    ttft_p95_ms: float
    kept: bool


class TooSlow(Exception):
    """Not even the lowest rate is kept."""


async def find_rate(try_rate: Callable[[float], Awaitable[Step]]) -> tuple[float, list[Step]]:
    """Return the highest rate that was kept, in requests a second, and all that were tried.

    Raises:
        TooSlow: none was kept.
    """
    steps: list[Step] = []
    rate = _FIRST_A_SECOND
    while len(steps) < _STEPS:
        steps.append(await try_rate(rate))
        if not steps[-1].kept:
            break
        rate *= _FACTOR
    kept = [step.a_second for step in steps if step.kept]
    if not kept:
        raise TooSlow
    if not steps[-1].kept:
        steps.append(await try_rate(math.sqrt(kept[-1] * steps[-1].a_second)))
    return max(step.a_second for step in steps if step.kept), steps


async def hold_rate(
    hold: Callable[[float], Awaitable[Step]], rate: float
) -> tuple[float, list[Step]]:
    """Return the first of `rate` and ever lower ones that is kept, and all that were tried.

    A short step does not show what piles up slowly: `hold` asks for long.

    Raises:
        TooSlow: none was kept.
    """
    steps: list[Step] = []
    while rate >= _FIRST_A_SECOND:
        steps.append(await hold(rate))
        if steps[-1].kept:
            return rate, steps
        rate *= _LOWER
    raise TooSlow
