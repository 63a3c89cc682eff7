"""Applications that are deployed again in another shape, under gateways that serve."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import httpx
import psutil
import pytest

from tests.chaos.conftest import GATEWAYS, PAIR
from tests.chaos.rollout import GATEWAY_APP, pids, replaced
from tests.serve_configs import FAKE_MODEL
from tests.stack_runner import RunningStack, wait_until


def _asked(stack: RunningStack, model: str = PAIR) -> int:
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
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
    # One that a test before has killed may still be on its way.
    wait_until(lambda: len(pids(stack, "Gateway")) == GATEWAYS, "all gateways are back", 90)
    gateways = pids(stack, "Gateway")
    config = stack.config()
    for name in ("pair-again", PAIR):
        stack.deploy(_renamed(config, name))
        wait_until(partial(_only, stack, name), "the replicas run under their new name", 90)
        wait_until(lambda: _asked(stack) == 200, "the model is served again", 60)
    assert pids(stack, "Gateway") == gateways


def _starting(stack: RunningStack, deployment: str, before: set[int]) -> psutil.Process:
    """Return the replica that is none of `before`, as soon as it has a title."""
    titles = (f"SERVE_REPLICA::gateway#{deployment}#", f":{deployment}")
    found: list[psutil.Process] = []

    def begun() -> bool:
        found[:] = [p for title in titles for p in stack.processes(title) if p.pid not in before]
        return bool(found)

    wait_until(begun, f"the next {deployment} is begun", 90)
    return found[0]


def _settle(stack: RunningStack, before: set[int]) -> None:
    """Wait until others serve than `before`, and see that they do."""
    wait_until(lambda: replaced(stack, before, *GATEWAY_APP), "all of it is replaced", 120)
    assert _asked(stack, FAKE_MODEL) == 200


def _deploy_and_suspend_limits(
    stack: RunningStack, config: dict[str, Any]
) -> tuple[psutil.Process, set[int], set[int]]:
    """Deploy the gateway anew, and stop the next Limits before it wants to be handed anything.

    Where it was too fast for us, it goes on, and another deployment is tried. Returns it, the
    replicas of before, and which of these are Limits.
    """
    for batch_rows in range(998, 994, -1):
        changed = deepcopy(config)
        changed["applications"][0]["args"] = {"request_log": {"batch_rows": batch_rows}}
        before, limits = pids(stack, *GATEWAY_APP), pids(stack, "Limits")
        stack.deploy(changed)
        starting = _starting(stack, "Limits", limits)
        starting.suspend()
        if not any("/limits/" in file.path for file in starting.open_files()):
            return starting, before, limits
        starting.resume()
        _settle(stack, before)
    raise AssertionError("the next Limits was too fast each time")


@pytest.mark.timeout(600)
def test_limits_are_kept_while_the_next_replica_starts(stack: RunningStack) -> None:
    wait_until(stack.ready, "ready", 60)
    config = stack.config()
    # A machine that takes long to start it: for as long as this test likes.
    starting, before, limits = _deploy_and_suspend_limits(stack, config)
    try:
        assert [_asked(stack, FAKE_MODEL) for _ in range(20)] == [200] * 20
        assert limits <= pids(stack, "Limits")
    finally:
        starting.resume()
    _settle(stack, before)
    assert pids(stack, "Limits") == {starting.pid}
    before = pids(stack, *GATEWAY_APP)
    stack.deploy(config)
    _settle(stack, before)
