"""The policy as Serve's controller calls it."""

from __future__ import annotations

from typing import Any

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from deployments.scaling import ByLatency
from serve_app.errors import ConfigError
from serve_app.scaling.targets import POLICY

_DEPLOYMENT = DeploymentID(name="Model:m", app_name="m")
_FIRST, _SECOND = (ReplicaID(name, deployment_id=_DEPLOYMENT) for name in ("a", "b"))


def context(**given: Any) -> AutoscalingContext:
    """Return what the controller says of two replicas that are at ease, but for what is given."""
    facts: dict[str, Any] = {
        "current_num_replicas": 2,
        "target_num_replicas": 2,
        "total_num_requests": 120.0,
        "total_queued_requests": 0.0,
        "aggregated_metrics": {},
        "capacity_adjusted_min_replicas": 0,
        "capacity_adjusted_max_replicas": 8,
        "current_time": 0.0,
        "config": AutoscalingConfig(max_replicas=8, target_ongoing_requests=100),
    }
    return AutoscalingContext(
        deployment_id=_DEPLOYMENT,
        deployment_name="Model:m",
        app_name="m",
        running_replicas=[_FIRST, _SECOND],
        raw_metrics=None,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        **(facts | given),
    )


def both(name: str, first: float, second: float) -> dict[str, Any]:
    return {name: {_FIRST: first, _SECOND: second}}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        pytest.param({}, 2, id="at ease"),
        pytest.param({"total_num_requests": 301.0}, 4, id="places"),
        pytest.param({"aggregated_metrics": both("first_token_s", 1.5, 4)}, 3, id="first tokens"),
        pytest.param({"aggregated_metrics": both("first_token_s", 1, 2)}, 2, id="their mean"),
        pytest.param(
            {"total_queued_requests": 3.0, "aggregated_metrics": both("waiting", 1, 2)},
            3,
            id="the queues of Ray and of the engines together",
        ),
        pytest.param({"total_num_requests": 0.0, "target_num_replicas": 1}, 0, id="idle"),
        pytest.param(
            {"current_num_replicas": 0, "target_num_replicas": 0, "total_num_requests": 1.0},
            1,
            id="woken",
        ),
        pytest.param({"capacity_adjusted_max_replicas": 1}, 1, id="bounds"),
    ],
)
def test_figures_of_the_controller_lead_to_a_number(given: dict[str, Any], wanted: int) -> None:
    assert ByLatency()(context(**given)) == (wanted, {})


def test_what_replicas_bear_is_remembered() -> None:
    policy = ByLatency()
    full = both("tokens_per_s", 3000, 3000) | both("first_token_s", 4, 4)
    assert policy(context(aggregated_metrics=full))[0] == 3
    # First tokens come in time again, but two replicas are as full as they were.
    near = context(aggregated_metrics=both("tokens_per_s", 2900, 2900), current_time=1.0)
    assert policy(near)[0] == 3
    assert ByLatency()(near)[0] == 2


def test_serve_finds_and_carries_it() -> None:
    config = AutoscalingConfig(
        policy={"policy_function": POLICY, "policy_kwargs": {"queue_wait_s": 3}}
    )
    policy = config.policy.get_policy()(**config.policy.policy_kwargs)
    assert policy(context()) == (2, {})


def test_wrong_target_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"policy_kwargs\.queue_wait"):
        ByLatency(queue_wait=3)
