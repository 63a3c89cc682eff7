"""The last of the suite, because each costs a start of the engine: what an engine can die of."""

from __future__ import annotations

import json
from functools import partial

import httpx
import pytest

from tests.serve_configs import REAL_MODEL, STUCK_AFTER_S
from tests.stack_runner import RunningStack, wait_until

# A start of the engine takes minutes on a slow machine.
pytestmark = pytest.mark.timeout(600)

_BODY = {"model": REAL_MODEL, "messages": [{"role": "user", "content": "Hi"}]}


def test_a_killed_replica_leaves_no_engine_behind_and_is_replaced(stack: RunningStack) -> None:
    [replica] = stack.replicas(f"Model:{REAL_MODEL}")
    engine = stack.processes("VLLM::")
    assert engine
    replica.kill()
    wait_until(
        lambda: not any(process.is_running() for process in engine), "the engine is gone", 20
    )
    wait_until(partial(_answers, stack), "the new replica answers", 300)


def test_a_stuck_engine_ends_its_streams_and_is_replaced(stack: RunningStack) -> None:
    [replica] = stack.replicas(f"Model:{REAL_MODEL}")
    engine = stack.processes("VLLM::")
    assert engine
    with httpx.stream(
        "POST",
        f"{stack.url}/v1/chat/completions",
        headers=stack.bootstrap,
        json=_BODY | {"max_tokens": 2000, "min_tokens": 2000, "stream": True},
        timeout=STUCK_AFTER_S + 60,
    ) as response:
        request_id = response.headers["x-request-id"]
        lines = response.iter_lines()
        first = next(line for line in lines if line.startswith("data: "))
        assert json.loads(first.removeprefix("data: "))["choices"]
        for process in engine:
            process.suspend()
        frames = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert "error" in json.loads(frames[-1]), "the stream ends with an error, not with [DONE]"
    [row] = stack.settled_rows(
        "select outcome from comp_ai.requests where request_id = $1", 1, request_id
    )
    assert row["outcome"] == "failed"
    wait_until(partial(_answers, stack), "the new replica answers", 300)
    assert not any(process.is_running() for process in engine), "no stopped process is left"
    assert not replica.is_running()


def _answers(stack: RunningStack) -> bool:
    answer = httpx.post(
        f"{stack.url}/v1/chat/completions",
        headers=stack.bootstrap,
        json=_BODY | {"max_tokens": 3},
        timeout=90,
    )
    return answer.status_code == 200
