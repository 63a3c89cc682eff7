"""The last of the suite, because it costs a start of the engine: kill the model's replica."""

from __future__ import annotations

import httpx

from tests.serve_configs import REAL_MODEL
from tests.stack_runner import RunningStack, wait_until


def test_a_killed_replica_leaves_no_engine_behind_and_is_replaced(stack: RunningStack) -> None:
    [replica] = stack.replicas(f"Model:{REAL_MODEL}")
    engine = stack.processes("VLLM::")
    assert engine
    replica.kill()
    wait_until(
        lambda: not any(process.is_running() for process in engine), "the engine is gone", 20
    )
    body = {"model": REAL_MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}

    def answers() -> bool:
        answer = httpx.post(
            f"{stack.url}/v1/chat/completions", headers=stack.bootstrap, json=body, timeout=90
        )
        return answer.status_code == 200

    wait_until(answers, "the new replica answers", 300)
