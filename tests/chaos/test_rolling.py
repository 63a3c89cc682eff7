"""Rolling updates of gateway and model, and one that fails, with 50 clients at work."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chaos.load import Load, Wishes
from tests.chaos.rollout import CHANGED, pids, replaced
from tests.serve_configs import FAKE_MODEL
from tests.stack_runner import COMP_AI, RunningStack, wait_until

CLIENTS = 50
# Of the answers that must come after the last change.
_AFTERWARDS = 100
_ROWS = """
select request_id, prompt_tokens + completion_tokens as tokens, limits_ms
from comp_ai.requests where request_id = any($1) and outcome = 'completed'
"""
_WISHES = Wishes(clients=CLIENTS, tokens=(1, 20), pause_s=1.5)


def _fake(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(a for a in config["applications"] if a["name"] == FAKE_MODEL)
    return found


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


async def _typed(stack: RunningStack, *words: str, code: int) -> str:
    """Run a command of the operator's, which must end with `code`; return what it says."""
    begun = time.monotonic()
    done = await asyncio.to_thread(
        subprocess.run,
        [COMP_AI, *words, "--yes"],
        env=stack.env,
        capture_output=True,
        text=True,
    )
    print(f"{words[0]}: {time.monotonic() - begun:.1f} s")
    assert done.returncode == code, done.stdout + done.stderr
    return str(done.stderr)


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
        print(f"{len(load.seen.completed)} completed, failed: {dict(load.seen.troubles)}")


async def _changes(stack: RunningStack, folder: Path) -> Load:
    """Change gateway and model, fail, and go back to where it began, all under load."""
    config = stack.config()
    good, bad = folder / "good.yaml", folder / "bad.yaml"
    good.write_text(yaml.safe_dump(_other_code(config)))
    bad.write_text(yaml.safe_dump(_failing(_other_code(config))))
    async with _clients(stack) as load:
        before = pids(stack, *CHANGED)
        await _typed(stack, "deploy", str(good), code=0)
        await _until(lambda: replaced(stack, before, *CHANGED), "every replica is a new one")
        changed = pids(stack, *CHANGED)
        told = await _typed(stack, "deploy", str(bad), code=1)
        assert "What ran before serves again." in told
        await _until(lambda: pids(stack, *CHANGED) == changed, "no replica was touched")
        await _typed(stack, "rollback", code=0)
        await _until(lambda: replaced(stack, changed, *CHANGED), "every replica is a new one again")
    return load


async def _until(condition: Callable[[], bool], what: str) -> None:
    # Serve calls a replica gone a moment before its process is.
    await asyncio.to_thread(wait_until, condition, what, 30)


@pytest.mark.timeout(900)
def test_no_request_fails(stack: RunningStack, tmp_path: Path) -> None:
    wait_until(stack.ready, "ready", 60)
    seen = asyncio.run(_changes(stack, tmp_path)).seen
    assert seen.failed == {}
    rows = stack.settled_rows(_ROWS, len(seen.completed), list(seen.completed))
    assert {row["request_id"]: row["tokens"] for row in rows} == seen.completed
    assert len(rows) == len(seen.completed)
    print(f"longest wait for the limits: {max(row['limits_ms'] for row in rows):.0f} ms")
    listed = json.loads(stack.cli("deploys", "--json"))
    assert [entry["outcome"] for entry in listed] == ["served", "served", "rolled back", "served"]
    assert listed[-1]["restores"] == 1
    acts = stack.rows(
        "select action, target from comp_ai.audit_log where action like 'deploy.%' order by seq"
    )
    assert [(act["action"], act["target"]) for act in acts] == [
        (action, str(number)) for number in (2, 3, 4) for action in ("deploy.start", "deploy.end")
    ]
