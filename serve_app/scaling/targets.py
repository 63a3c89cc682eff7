"""What the autoscaler aims at: `policy_kwargs` of a model's `autoscaling_config.policy`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from serve_app.config import parse_config

# Where the policy is imported from, as a Serve config names it.
POLICY = "deployments.scaling:ByLatency"


class ScalingTargets(BaseModel):
    """When replicas are added and given up."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    queue_wait_s: float = Field(
        default=1.0,
        gt=0,
        description="Longest mean wait for a place in an engine: above it replicas are added.",
    )
    time_to_first_token_s: float = Field(
        default=2.0,
        gt=0,
        description="Longest time, at p90 of the last 30 s, from a replica's door to the first "
        "token: above it replicas are added. Keep it above what your long prompts take on an idle "
        "replica: no number of replicas makes those faster.",
    )
    growth: float = Field(
        default=1.5,
        gt=1,
        le=4,
        description="How many times as many replicas may be asked for at once because of waits. "
        "These grow without bound when load is a little too high, so they say that replicas are "
        "missing, not how many.",
    )
    full: float = Field(
        default=0.85,
        gt=0,
        le=1,
        description="Part of the tokens per second that a replica was seen to bear at which "
        "another one is added. Lower it where models start slowly or load grows fast.",
    )
    headroom: float = Field(
        default=0.75,
        gt=0,
        le=0.95,
        description="Part of that, and of the other bounds, that those who stay may have when a "
        "replica is given up. The gap is what keeps a steady load from flapping.",
    )


def check_scaling(applications: Iterable[Mapping[str, Any]]) -> None:
    """Check the targets that the applications of a Serve config give to our policy.

    Serve reads them in its controller only, where a wrong one would stop every deployment.

    Raises:
        ConfigError: names the setting, the value and what is allowed.
    """
    for app in applications:
        for deployment in app.get("deployments", ()):
            policy = (deployment.get("autoscaling_config") or {}).get("policy") or {}
            if policy.get("policy_function") == POLICY:
                where = f"applications.{app['name']}.deployments.{deployment['name']}"
                setting = f"{where}.autoscaling_config.policy.policy_kwargs"
                parse_config(ScalingTargets, policy.get("policy_kwargs") or {}, setting)
