"""How many users there are while a load test runs: shapes over its length.

Each shape is a function of the part of the time that is over (0 to 1) and gives the part of the
most users (0 to 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from load_tests.autoscaling.trace import DAY_S, of_day

_STEPS = 5
_SPIKE_BASE = 0.2
_SPIKE = (0.4, 0.5)
_SOAK_RAMP, _SOAK_LEVEL = 0.05, 0.7


def steady(_: float) -> float:
    """All users from the beginning on."""
    return 1.0


def step(part: float) -> float:
    """Five steps up: where does it break?"""
    return min(_STEPS, math.floor(part * _STEPS) + 1) / _STEPS


def spike(part: float) -> float:
    """Five times as many for a tenth of the time: is it survived, and does it recover?"""
    return 1.0 if _SPIKE[0] <= part < _SPIKE[1] else _SPIKE_BASE


def soak(part: float) -> float:
    """70 % for long: does something grow?"""
    return _SOAK_LEVEL * min(1.0, part / _SOAK_RAMP)


def day(part: float) -> float:
    """A day of an office."""
    return of_day(part * DAY_S)


SHAPES: Mapping[str, Callable[[float], float]] = {
    shape.__name__: shape for shape in (steady, step, spike, soak, day)
}


def users_at(shape: str, at_s: float, *, length_s: float, most: int) -> int | None:
    """Return how many users there are at `at_s`, at least one; None when the time is over."""
    if at_s >= length_s:
        return None
    return max(1, round(SHAPES[shape](at_s / length_s) * most))
