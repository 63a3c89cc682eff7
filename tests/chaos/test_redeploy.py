"""A model's application that is deployed again in another shape, under a running gateway."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import httpx

from tests.chaos.conftest import PAIR
from tests.stack_runner import RunningStack, wait_until


def _asked(stack: RunningStack) -> int:
    body = {"model": PAIR, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
    url = f"{stack.url}/v1/chat/completions"
    return httpx.post(url, headers=stack.bootstrap, json=body, timeout=60).status_code


def _renamed(config: dict[str, Any], name: str) -> dict[str, Any]:
    renamed = deepcopy(config)
    [app] = [app for app in renamed["applications"] if app["name"] == PAIR]
    app["args"]["name"] = name
    app["deployments"][0]["name"] = f"Model:{name}"
    return renamed


def _only(stack: RunningStack, name: str) -> bool:
    title = f"ray::ServeReplica:{PAIR}:"
    return {found.strip() for found in stack.titles(title)} == {f"{title}Model:{name}"}


def test_model_is_found_again_under_another_deployment_name(stack: RunningStack) -> None:
    wait_until(stack.ready, "ready", 60)
    assert _asked(stack) == 200
    gateways = {replica.pid for replica in stack.replicas("Gateway")}
    config = stack.config()
    for name in ("pair-again", PAIR):
        stack.deploy(_renamed(config, name))
        wait_until(partial(_only, stack, name), "the replicas run under their new name", 90)
        wait_until(lambda: _asked(stack) == 200, "the model is served again", 60)
    assert {replica.pid for replica in stack.replicas("Gateway")} == gateways
