"""Tokens in the log equal the engine's own count, also where the client left."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.serve_configs import FAKE_MODEL, REAL_MODEL
from tests.stack_runner import RunningStack, wait_until


def _chat(model: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Tell me a very long story"}]
    return {"model": model, "messages": messages} | fields


def _leave_after(
    stack: RunningStack, seconds: float, model: str, request_id: str, **fields: Any
) -> None:
    headers = stack.bootstrap | {"X-Request-ID": request_id}
    body = _chat(model, max_tokens=2000, ignore_eos=True, **fields)
    with (
        pytest.raises(httpx.ReadTimeout),
        httpx.stream(
            "POST",
            f"{stack.url}/v1/chat/completions",
            headers=headers,
            json=body,
            timeout=httpx.Timeout(30, read=seconds),
        ) as response,
    ):
        # A stream that runs is cut by the clock, not by a gap in it.
        _read_for(response, seconds)


def _read_for(response: httpx.Response, seconds: float) -> None:
    import time

    until = time.monotonic() + seconds
    for _ in response.iter_raw():
        if time.monotonic() > until:
            raise httpx.ReadTimeout("left on purpose")


@pytest.mark.parametrize("model", [REAL_MODEL, FAKE_MODEL])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_the_engine(
    stack: RunningStack, model: str, stream: bool
) -> None:
    stack.engine(model)
    request_id = uuid.uuid4().hex
    _leave_after(stack, 4, model, request_id, stream=stream)
    # The contract says 1 s; the rest is for a machine that has other things to do.
    wait_until(lambda: stack.engine(model)["requests_running"] == 0, "the engine is idle", 5)
    [row] = stack.settled_rows(
        "select * from comp_ai.requests where request_id = $1", 1, request_id
    )
    assert (row["status"], row["outcome"]) == (499, "cancelled")
    assert row["completion_tokens"] > 0
    assert row["finish_reason"] == "abort"
    # The gateway may still keep that of a request before.
    wait_until(lambda: stack.engine(model)["live_leases"] == 0, "no lease is left", 10)


def test_tokens_in_the_log_equal_the_engines(stack: RunningStack) -> None:
    def whole(index: int) -> None:
        body = _chat(REAL_MODEL, max_tokens=5 + index, stream=index % 2 == 0)
        answer = httpx.post(
            f"{stack.url}/v1/chat/completions", headers=stack.bootstrap, json=body, timeout=120
        )
        assert answer.status_code == 200

    def left(index: int) -> None:
        _leave_after(stack, 1 + index / 2, REAL_MODEL, uuid.uuid4().hex, stream=index % 2 == 0)

    with ThreadPoolExecutor(12) as pool:
        jobs = [pool.submit(whole, i) for i in range(12)] + [pool.submit(left, i) for i in range(6)]
    for job in jobs:
        job.result()
    wait_until(lambda: stack.engine(REAL_MODEL)["requests_running"] == 0, "idle", 10)
    engine = stack.engine(REAL_MODEL)

    def logged() -> tuple[int, int]:
        [row] = stack.rows(
            "select sum(prompt_tokens) as p, sum(completion_tokens) as c "
            "from comp_ai.requests where model = $1",
            REAL_MODEL,
        )
        return int(row["p"]), int(row["c"])

    wait_until(
        lambda: logged() == (engine["prompt_tokens"], engine["completion_tokens"]),
        f"the log {logged()} equals the engine {engine}",
        30,
    )
