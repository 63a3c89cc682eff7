"""The shipped Serve configs fit Serve's schema and our own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from deployments.model import deployment_name
from deployments.options import ModelArgs
from serve_app.config import GatewayConfig, parse_config
from serve_app.scaling.targets import POLICY, check_scaling
from serve_app.settings import load_settings

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def _load(path: Path) -> dict[str, Any]:
    raw: dict[str, Any] = yaml.safe_load(path.read_text())
    return raw


def _apps(raw: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {app["name"]: app for app in raw["applications"]}


def _deployment(app: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(d for d in app["deployments"] if d["name"] == name)
    return found


def _gateway_config(raw: dict[str, Any]) -> GatewayConfig:
    gateway = _deployment(_apps(raw)["gateway"], "Gateway")
    return parse_config(GatewayConfig, gateway["user_config"], "user_config")


def test_all_settings_ship() -> None:
    assert {path.stem for path in CONFIGS} == {
        "local-cpu",
        "local-cpu-models",
        "single-gpu",
        "cluster",
    }


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def raw(request: pytest.FixtureRequest) -> dict[str, Any]:
    return _load(request.param)


def test_serve_takes_it(raw: dict[str, Any]) -> None:
    ServeDeploySchema.model_validate(raw)


def test_every_model_on_offer_has_an_application_that_is_a_real_model(raw: dict[str, Any]) -> None:
    for model in _gateway_config(raw).models:
        app = _apps(raw)[model.app]
        args = parse_config(ModelArgs, app["args"], "args")
        assert app["import_path"] == "deployments.model:build"
        assert app["route_prefix"] is None, "only the gateway is reachable"
        assert args.name == model.name, "the engine answers under the name that clients send"


def test_the_context_is_that_of_the_engine(raw: dict[str, Any]) -> None:
    for model in _gateway_config(raw).models:
        engine = _apps(raw)[model.app]["args"]["engine"]
        assert model.context_tokens == engine.get("max_model_len")


def test_models_have_bounded_queues_and_autoscaling(raw: dict[str, Any]) -> None:
    for model in _gateway_config(raw).models:
        deployment = _deployment(_apps(raw)[model.app], deployment_name(model.name))
        assert deployment["max_ongoing_requests"] > 0
        assert deployment["max_queued_requests"] > 0
        assert deployment["autoscaling_config"]["target_ongoing_requests"] > 0


def test_models_with_several_replicas_are_scaled_by_what_people_wait_for(
    raw: dict[str, Any],
) -> None:
    check_scaling(raw["applications"])
    for app in raw["applications"]:
        for deployment in app["deployments"]:
            scaling = deployment.get("autoscaling_config") or {}
            if scaling.get("max_replicas", 1) > 1:
                config = AutoscalingConfig(**scaling)
                assert config.policy.policy_function == POLICY
                config.policy.get_policy()(**config.policy.policy_kwargs)


def test_the_gateway_outlives_its_longest_stream(raw: dict[str, Any]) -> None:
    gateway = _deployment(_apps(raw)["gateway"], "Gateway")
    deadline_s = _gateway_config(raw).deadline_s
    assert gateway["graceful_shutdown_timeout_s"] > deadline_s


def test_an_update_leaves_a_gateway_and_a_log_that_serve(raw: dict[str, Any]) -> None:
    for name in ("Gateway", "RequestLog"):
        deployment = _deployment(_apps(raw)["gateway"], name)
        surge = deployment.get("max_surge_percent", 0)
        assert surge > 0 or deployment["num_replicas"] > 1
        # A node that may have one of them has no room for two.
        assert not (surge and deployment.get("max_replicas_per_node"))


def test_the_limits_are_handed_over_on_one_machine_and_never_kept_twice(
    raw: dict[str, Any],
) -> None:
    limits = _deployment(_apps(raw)["gateway"], "Limits")
    # On a worker that Ray chooses: the next one may not see the journal of the one before.
    placed_anywhere = bool(limits["ray_actor_options"].get("resources"))
    surge = 0 if placed_anywhere else 100
    assert (limits["num_replicas"], limits["max_surge_percent"]) == (1, surge)


def test_serve_itself_sets_no_time_limit(raw: dict[str, Any]) -> None:
    assert raw["http_options"]["request_timeout_s"] is None


def test_the_port_is_the_default_of_the_settings(raw: dict[str, Any]) -> None:
    assert raw["http_options"]["port"] == load_settings({}).service.port


def test_answers_are_durable_by_default(raw: dict[str, Any]) -> None:
    assert _gateway_config(raw).durability == "sync"
