"""Rolling updates of gateway and model, and one that fails, with 50 clients at work."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.chaos.load import Load, Wishes
from tests.chaos.reconcile import forget_counts, reconcile
from tests.chaos.storm import Storm
from tests.serve_configs import FAKE_MODEL
from tests.stack_runner import COMP_AI, RunningStack, wait_until

CLIENTS = 50
# Of the answers that must come after the last change.
_AFTERWARDS = 100
_WISHES = Wishes(clients=CLIENTS, tokens=(1, 20), pause_s=0.5)


def _fake(config: dict[str, Any]) -> dict[str, Any]:
    [app] = [app for app in config["applications"] if app["name"] == FAKE_MODEL]
    return dict(app)


def _other_code(config: dict[str, Any]) -> dict[str, Any]:
    """Return `config` with a gateway and a model that must be started anew."""
    changed = deepcopy(config)
    changed["applications"][0]["args"] = {"request_log": {"batch_rows": 999}}
    _fake(changed)["args"]["speed"]["time_to_first_token_s"] = 0.03
    return changed


def _failing(config: dict[str, Any]) -> dict[str, Any]:
    """Return `config` with a model that Serve cannot start."""
    changed = deepcopy(config)
    # A folder that cannot be made: no check sees that before the replica tries.
    _fake(changed)["args"]["speed"]["journal"] = "/proc/nowhere"
    return changed


async def _typed(stack: RunningStack, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the operator's."""
    return await asyncio.to_thread(
        subprocess.run, [COMP_AI, *words], env=stack.env, capture_output=True, text=True
    )


@asynccontextmanager
async def _clients(stack: RunningStack) -> AsyncIterator[Load]:
    load = Load(stack.url, stack.bootstrap, _WISHES)
    running = asyncio.create_task(load.run())
    try:
        await load.completed(CLIENTS)
        yield load
        await load.completed(_AFTERWARDS)
    finally:
        load.stop()
        await running


def _pids(replicas: list[psutil.Process]) -> set[int]:
    return {replica.pid for replica in replicas}


async def _changes(stack: RunningStack, folder: Path) -> Load:
    """Change gateway and model, fail, and go back to where it began, all under load."""
    config = stack.config()
    first, second = folder / "first.yaml", folder / "second.yaml"
    first.write_text(yaml.safe_dump(_other_code(config)))
    second.write_text(yaml.safe_dump(_failing(_other_code(config))))
    async with _clients(stack) as load:
        before = _pids(stack.replicas("Gateway")) | _pids(stack.replicas(f"Model:{FAKE_MODEL}"))
        begun = time.monotonic()
        done = await _typed(stack, "deploy", str(first), "--yes")
        assert done.returncode == 0, done.stderr
        now = _pids(stack.replicas("Gateway")) | _pids(stack.replicas(f"Model:{FAKE_MODEL}"))
        assert len(now) == 3
        assert not before & now
        updated = time.monotonic()
        done = await _typed(stack, "deploy", str(second), "--yes")
        assert done.returncode == 1, done.stderr
        assert "What ran before serves again." in done.stderr
        assert now == _pids(stack.replicas("Gateway")) | _pids(
            stack.replicas(f"Model:{FAKE_MODEL}")
        )
        failed = time.monotonic()
        done = await _typed(stack, "rollback", "--yes")
        assert done.returncode == 0, done.stderr
        back = time.monotonic()
    print(
        f"updated in {updated - begun:.1f} s, failed and back in {failed - updated:.1f} s, "
        f"rolled back in {back - failed:.1f} s"
    )
    return load


@pytest.mark.timeout(400)
def test_no_request_fails(stack: RunningStack, journals: Path, tmp_path: Path) -> None:
    wait_until(stack.ready, "ready", 60)
    forget_counts(journals)
    load = asyncio.run(_changes(stack, tmp_path))
    account = reconcile(stack, Storm(seen=load.seen), journals)
    print(account)
    assert load.seen.failed == {}
    assert (account.wrong, account.unrecorded) == ([], 0)
    listed = json.loads(stack.cli("deploys", "--json"))
    assert [entry["outcome"] for entry in listed] == ["served", "served", "rolled back", "served"]
    assert listed[-1]["restores"] == 1
    acts = stack.rows(
        "select action, target from comp_ai.audit_log where action like 'deploy.%' order by seq"
    )
    assert [(act["action"], act["target"]) for act in acts] == [
        (action, str(number)) for number in (2, 3, 4) for action in ("deploy.start", "deploy.end")
    ]
