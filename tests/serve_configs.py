"""Serve configs for the suites, made of the shipped one so that they cannot drift from it."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

_SHIPPED = Path(__file__).resolve().parents[1] / "configs" / "local-cpu.yaml"
REAL_MODEL = "smollm2-135m-instruct"
FAKE_MODEL = "fake"
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
        }
    ],
}


def suite_config(*, real_model: bool, gateways: int) -> dict[str, Any]:
    """Return the shipped CPU config with a fake model beside or instead of the real one."""
    config: dict[str, Any] = yaml.safe_load(_SHIPPED.read_text())
    if not real_model:
        config["applications"] = [config["applications"][0]]
    config["applications"].append(deepcopy(_FAKE_APP))
    gateway = config["applications"][0]["deployments"][0]
    gateway["num_replicas"] = gateways
    # A replica that is told to stop while a test still streams is not waited for.
    gateway["graceful_shutdown_timeout_s"] = 10
    policy = gateway["user_config"]
    names = [REAL_MODEL, FAKE_MODEL] if real_model else [FAKE_MODEL]
    policy["models"] = [{"name": name, "app": name, "max_tokens": 2048} for name in names]
    policy["limits"] = {
        "default": {"requests_per_minute": 100_000, "concurrency": 1000},
        "principals": {LIMITED_OWNER: {"requests_per_minute": 10}},
    }
    return config
