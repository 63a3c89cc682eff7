"""From what is seen of a model's replicas to how many there should be.

Three things add replicas. The requests that are there need places; that is known at once. A load
near what replicas were seen to bear; that is known while a new one can still start in time. Waits
above their targets; that is known late, but whatever the cause. One replica is given up at a time,
where those who stay are known to bear the load with room to spare.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from serve_app.scaling.targets import ScalingTargets

# How long waits above their targets take to change our mind of what a replica bears.
_LEARN_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What the configuration allows. `places` is how many requests one replica should hold."""

    min_replicas: int
    max_replicas: int
    places: float

    def clip(self, replicas: int) -> int:
        """Return the allowed number that is nearest."""
        return max(self.min_replicas, min(self.max_replicas, replicas))


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What is seen of all replicas of a model, each figure a mean over the look-back period.

    `target` counts replicas that start, `running` does not. `ongoing` are the requests that
    wait or run, `waiting` those of them that no engine has begun, `begun_per_s` how many are
    begun. `first_token_s` is the p90 at a replica. `tokens_per_s` are those of prompts and
    answers together.
    """

    at_s: float
    running: int
    target: int
    ongoing: float = 0.0
    waiting: float = 0.0
    begun_per_s: float = 0.0
    first_token_s: float = 0.0
    tokens_per_s: float = 0.0

    @property
    def queue_wait_s(self) -> float:
        """The mean wait, by Little's law; it grows before anybody has waited so long."""
        # Who is just about to be begun does not wait for a place.
        if self.waiting < max(1, self.running):
            return 0.0
        return self.waiting / self.begun_per_s if self.begun_per_s else math.inf


def pressure(seen: Seen, targets: ScalingTargets) -> float:
    """Return the waits as a multiple of their targets: the worse of the two."""
    return max(
        seen.queue_wait_s / targets.queue_wait_s,
        seen.first_token_s / targets.time_to_first_token_s,
    )


class Capacity:
    """The tokens per second that one replica bears, learned where waits met their targets.

    It depends on model, hardware and prompts, so no setting could say it.
    """

    def __init__(self) -> None:
        self.tokens_per_s: float | None = None
        self._learned_at_s = -math.inf

    def learn(self, seen: Seen, pressure: float) -> None:
        """Take `seen` into account: lower the figure slowly, raise it where more is borne."""
        passed_s, self._learned_at_s = seen.at_s - self._learned_at_s, seen.at_s
        if not seen.running or not seen.tokens_per_s:
            return
        each = seen.tokens_per_s / seen.running
        if self.tokens_per_s is None:
            self.tokens_per_s = each if pressure >= 1 else None
        elif pressure < 1:
            self.tokens_per_s = max(each, self.tokens_per_s)
        else:
            self.tokens_per_s += (each - self.tokens_per_s) * -math.expm1(-passed_s / _LEARN_S)


def replicas_wanted(
    seen: Seen, bounds: Bounds, targets: ScalingTargets, bears_tokens_per_s: float | None
) -> int:
    """Return how many replicas there should be.

    Args:
        bears_tokens_per_s: what one replica is known to bear; None where that is not known yet.
    """
    if not seen.running:
        awake = 1 if seen.ongoing > 0 else 0
        return bounds.clip(max(seen.target, awake, _for_places(seen, bounds)))
    more = max(
        _for_places(seen, bounds),
        _for_load(seen, targets, bears_tokens_per_s),
        _for_waits(seen, targets),
    )
    if more < seen.target and _can_do_with(
        seen.target - 1, seen, bounds, targets, bears_tokens_per_s
    ):
        return bounds.clip(seen.target - 1)
    return bounds.clip(max(more, seen.target))


def _for_places(seen: Seen, bounds: Bounds) -> int:
    return math.ceil(seen.ongoing / bounds.places)


def _for_load(seen: Seen, targets: ScalingTargets, bears: float | None) -> int:
    return math.ceil(seen.tokens_per_s / (bears * targets.full)) if bears else 0


def _for_waits(seen: Seen, targets: ScalingTargets) -> int:
    # While one starts, waits say nothing new: it was asked for because of them.
    worst = pressure(seen, targets)
    if worst <= 1 or seen.target > seen.running:
        return 0
    return math.ceil(seen.running * min(worst, targets.growth))


def _can_do_with(
    replicas: int, seen: Seen, bounds: Bounds, targets: ScalingTargets, bears: float | None
) -> bool:
    """Tell whether so many replicas would bear what is there, with room to spare."""
    if replicas == 0:
        return seen.ongoing == 0
    spare = replicas * targets.headroom
    return (
        pressure(seen, targets) <= targets.headroom
        and seen.ongoing <= spare * bounds.places
        and (bears is None or seen.tokens_per_s <= spare * targets.full * bears)
    )
