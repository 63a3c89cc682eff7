"""The policies, each with Ray's own code around it, as Serve's controller runs them."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ray.serve import autoscaling_policy as rays
from ray.serve._private.common import DeploymentID
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from deployments.scaling import ByLatency

LOOK_BACK_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What the controller knows: means over the look-back period, by replica where it says so."""

    running: int
    target: int
    ongoing: float
    queued: float
    told: dict[str, dict[str, float]]


class Controller:
    """Decides as Serve's controller would, by the clock of the simulation."""

    def __init__(self, config: AutoscalingConfig, policy: Any) -> None:
        self._config = config
        # What Serve wraps every policy in: delays, factors, the start from zero.
        self._policy = rays._apply_autoscaling_config(policy)
        self._state: dict[str, Any] = {}

    def decide(self, at_s: float, figures: Figures) -> int:
        """Return how many replicas to aim at."""
        # The delays are measured by the module's own clock.
        rays.time = SimpleNamespace(time=lambda: at_s, monotonic=lambda: at_s)
        wanted, self._state = self._policy(self._context(at_s, figures))
        return max(self._config.min_replicas, min(self._config.max_replicas, int(wanted)))

    def _context(self, at_s: float, figures: Figures) -> AutoscalingContext:
        return AutoscalingContext(
            deployment_id=DeploymentID(name="Model:m", app_name="m"),
            deployment_name="Model:m",
            app_name="m",
            current_num_replicas=figures.running,
            target_num_replicas=figures.target,
            running_replicas=[],
            total_num_requests=figures.ongoing,
            total_queued_requests=figures.queued,
            aggregated_metrics=figures.told,
            raw_metrics=None,
            capacity_adjusted_min_replicas=self._config.min_replicas,
            capacity_adjusted_max_replicas=self._config.max_replicas,
            policy_state=dict(self._state),
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=at_s,
            config=self._config,
        )


def rays_policy(target: float, **config: Any) -> Controller:
    """Return Ray's default policy at a number of ongoing requests a replica."""
    settings = AutoscalingConfig(target_ongoing_requests=target, **config)
    return Controller(settings, rays.replica_queue_length_autoscaling_policy)


def our_policy(places: float, targets: dict[str, float], **config: Any) -> Controller:
    """Return our policy with these targets."""
    settings = AutoscalingConfig(target_ongoing_requests=places, **config)
    return Controller(settings, ByLatency(**targets))
