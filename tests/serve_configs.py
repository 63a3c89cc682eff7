"""Serve configs for the suites, made of the shipped one so that they cannot drift from it."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from serve_app.scaling.targets import POLICY

_CONFIGS = Path(__file__).resolve().parents[1] / "configs"
REAL_MODEL = "smollm2-135m-instruct"
# Each token of the answer leads by 0.9 and more. Asked about France the model begins with "The",
# which leads by 0.1 over "L'".
QUESTION = "What is the capital of Japan?"
ANSWER = "The capital of Japan is Tokyo."
EMBEDDING_MODEL = "all-minilm-l6-v2"
ADAPTER = "smollm2-wild"
FAKE_MODEL = "fake"
# How long the suites let the real engine stand still. On a slow machine the first step takes long.
STUCK_AFTER_S = 60
# One application that is scaled to zero when idle, offered as one that is waited for and as one
# that is not.
COLD_MODEL = "cold"
COLD_MODEL_REFUSED = "cold-refused"
LIMITED_OWNER = "limited"

_FAKE_APP: dict[str, Any] = {
    "name": FAKE_MODEL,
    "route_prefix": None,
    "import_path": "deployments.fake_model:build",
    "args": {
        "name": FAKE_MODEL,
        "speed": {"time_to_first_token_s": 0.02, "time_per_token_s": 0.01},
    },
    "deployments": [
        {
            "name": f"Model:{FAKE_MODEL}",
            "num_replicas": 1,
            "max_ongoing_requests": 200,
            "max_queued_requests": 200,
            "max_surge_percent": 100,
        }
    ],
}

_COLD_APP: dict[str, Any] = {
    **_FAKE_APP,
    "name": COLD_MODEL,
    "args": {"name": COLD_MODEL},
    "deployments": [
        {
            "name": f"Model:{COLD_MODEL}",
            "max_ongoing_requests": 200,
            "autoscaling_config": {
                "min_replicas": 0,
                "initial_replicas": 0,
                "max_replicas": 2,
                "target_ongoing_requests": 100,
                "upscale_delay_s": 0,
                "downscale_delay_s": 1,
                "downscale_to_zero_delay_s": 1,
                "look_back_period_s": 1,
                "metrics_interval_s": 0.5,
                # Less than the fake engine takes.
                "policy": {
                    "policy_function": POLICY,
                    "policy_kwargs": {"time_to_first_token_s": 0.01},
                },
            },
            "graceful_shutdown_timeout_s": 5,
        }
    ],
}
_COLD_MODELS = [
    {"name": COLD_MODEL, "app": COLD_MODEL, "max_tokens": 2048},
    {"name": COLD_MODEL_REFUSED, "app": COLD_MODEL, "max_tokens": 2048, "when_cold": "refuse"},
]


def add_fake(config: dict[str, Any], name: str, *, replicas: int, **speed: float) -> None:
    """Add a fake model of its own to a config, for answers of up to a million tokens."""
    app = deepcopy(_FAKE_APP)
    app["name"] = app["args"]["name"] = name
    app["args"]["speed"] |= speed
    app["deployments"][0] |= {"name": f"Model:{name}", "num_replicas": replicas}
    config["applications"].append(app)
    policy = config["applications"][0]["deployments"][0]["user_config"]
    policy["models"].append({"name": name, "app": name, "max_tokens": 1_000_000})


def keep_journals(config: dict[str, Any], folder: Path) -> None:
    """Have the engines of the fake model note in `folder` what they count."""
    _app(config, FAKE_MODEL)["args"]["speed"]["journal"] = str(folder)


def suite_config(*, real_model: bool, gateways: int, cold_model: bool = False) -> dict[str, Any]:
    """Return the shipped CPU config with a fake model beside or instead of the real one."""
    config: dict[str, Any] = shipped("local-cpu")
    if not real_model:
        config["applications"] = [config["applications"][0]]
    config["applications"].append(deepcopy(_FAKE_APP))
    gateway = config["applications"][0]["deployments"][0]
    gateway["num_replicas"] = gateways
    # A replica that is told to stop while a test still streams is not waited for. It takes new
    # requests for the first 10 s of it.
    gateway["graceful_shutdown_timeout_s"] = 15
    policy = gateway["user_config"]
    names = [REAL_MODEL, FAKE_MODEL] if real_model else [FAKE_MODEL]
    policy["models"] = [{"name": name, "app": name, "max_tokens": 2048} for name in names]
    if real_model:
        policy["models"][0]["priority"] = True
    if cold_model:
        config["applications"].append(deepcopy(_COLD_APP))
        policy["models"] += deepcopy(_COLD_MODELS)
    policy["limits"] = {
        "default": {"requests_per_minute": 100_000, "concurrency": 1000},
        "principals": {LIMITED_OWNER: {"requests_per_minute": 10}},
    }
    return config


def with_adapter(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return `config` with the LoRA adapter in `folder` beside the real model."""
    config = deepcopy(config)
    app = _app(config, REAL_MODEL)
    app["args"]["adapters"] = [{"name": ADAPTER, "weights": str(folder)}]
    _models(config).append({"name": ADAPTER, "app": REAL_MODEL, "max_tokens": 2048})
    return config


def quick_to_notice(config: dict[str, Any]) -> dict[str, Any]:
    """Return `config` with a real model that is soon found stuck."""
    config = deepcopy(config)
    app = _app(config, REAL_MODEL)
    app["args"]["stuck_after_s"] = STUCK_AFTER_S
    app["deployments"][0]["health_check_period_s"] = 2
    return config


def with_embedding_model(config: dict[str, Any]) -> dict[str, Any]:
    """Return `config` with the embedding model as it is shipped."""
    models = shipped("local-cpu-models")
    config = deepcopy(config)
    config["applications"].append(_app(models, EMBEDDING_MODEL))
    _models(config).extend(m for m in _models(models) if m["name"] == EMBEDDING_MODEL)
    return config


def shipped(name: str) -> dict[str, Any]:
    """Return one of the shipped Serve configs."""
    config: dict[str, Any] = yaml.safe_load((_CONFIGS / f"{name}.yaml").read_text())
    return config


def _app(config: dict[str, Any], name: str) -> dict[str, Any]:
    app: dict[str, Any] = next(a for a in config["applications"] if a["name"] == name)
    return app


def _models(config: dict[str, Any]) -> list[dict[str, Any]]:
    models: list[dict[str, Any]] = config["applications"][0]["deployments"][0]["user_config"][
        "models"
    ]
    return models
