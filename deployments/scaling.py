"""Our autoscaling policy behind Ray Serve's: `autoscaling_config.policy` of a model names it.

Ray brings the figures, applies its own delays and bounds, and starts and stops replicas.
"""

from __future__ import annotations

from typing import Any

from ray.serve.config import AutoscalingContext

from serve_app.config import parse_config
from serve_app.scaling.policy import Bounds, Capacity, Seen, pressure, replicas_wanted
from serve_app.scaling.targets import ScalingTargets


class ByLatency:
    """Keeps queue wait and time to first token at their targets. Serve keeps one a deployment."""

    def __init__(self, **targets: Any) -> None:
        """Raise ConfigError where `targets`, the `policy_kwargs`, are wrong."""
        self._targets = parse_config(ScalingTargets, targets, "policy_kwargs")
        self._capacity = Capacity()

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Return how many replicas there should be, and no state for Ray to keep."""
        seen = _seen(context)
        self._capacity.learn(seen, pressure(seen, self._targets))
        wanted = replicas_wanted(seen, _bounds(context), self._targets, self._capacity.tokens_per_s)
        return wanted, {}


def _bounds(context: AutoscalingContext) -> Bounds:
    return Bounds(
        min_replicas=context.capacity_adjusted_min_replicas,
        max_replicas=context.capacity_adjusted_max_replicas,
        places=context.config.get_target_ongoing_requests(),
    )


def _seen(context: AutoscalingContext) -> Seen:
    running = context.current_num_replicas
    told = context.aggregated_metrics or {}

    def of_all(name: str) -> float:
        return float(sum(told.get(name, {}).values()))

    return Seen(
        at_s=context.current_time,
        running=running,
        target=context.target_num_replicas,
        ongoing=context.total_num_requests,
        # Those who wait for a replica, and those who wait in an engine.
        waiting=context.total_queued_requests + of_all("waiting"),
        begun_per_s=of_all("begun_per_s"),
        # A replica that has told nothing yet makes nobody wait.
        first_token_s=of_all("first_token_s") / max(1, running),
        tokens_per_s=of_all("tokens_per_s"),
    )
