"""Models that are scaled by our policy: to zero, back, and by their time to first token."""

from __future__ import annotations

import time

import httpx

from tests.serve_configs import COLD_MODEL, COLD_MODEL_REFUSED
from tests.stack_runner import RunningStack, wait_until

_START_S = 60.0


def _ask(stack: RunningStack, model: str, **more: object) -> httpx.Response:
    messages = [{"role": "user", "content": "Hi"}]
    body = {"model": model, "messages": messages, "max_tokens": 3, **more}
    url = f"{stack.url}/v1/chat/completions"
    return httpx.post(url, headers=stack.bootstrap, json=body, timeout=2 * _START_S)


def _outcome(answer: httpx.Response) -> tuple[int, str | None]:
    error = answer.json().get("error") or {}
    return answer.status_code, error.get("code")


def _asleep(stack: RunningStack) -> None:
    def no_replica() -> bool:
        return not stack.replicas(f"Model:{COLD_MODEL}")

    wait_until(no_replica, "the model is scaled to zero", _START_S)


def test_a_model_that_is_scaled_to_zero_is_started_for_the_request(stack: RunningStack) -> None:
    _asleep(stack)
    answer = _ask(stack, COLD_MODEL)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-comp-ai-queue-position"] == "0"
    [row] = stack.settled_rows(
        "select queue_ms, duration_ms from comp_ai.requests where request_id = $1",
        1,
        answer.headers["x-request-id"],
    )
    # It waited for the start and for nothing else.
    assert row["queue_ms"] > 0.5 * row["duration_ms"]


def test_a_model_that_is_not_waited_for_is_refused_and_started(stack: RunningStack) -> None:
    _asleep(stack)
    begun_s = time.monotonic()
    first = _ask(stack, COLD_MODEL_REFUSED)
    assert _outcome(first) == (503, "model_not_ready")
    assert 1 <= int(first.headers["retry-after"]) <= 60
    assert first.headers["x-comp-ai-queue-position"] == "0"
    wait_until(lambda: _ask(stack, COLD_MODEL_REFUSED).status_code == 200, "served", _START_S)
    print(f"cold start: {time.monotonic() - begun_s:.1f} s")
    _asleep(stack)
    wait_until(stack.ready, "ready", _START_S)


def test_slow_first_tokens_start_another_replica(stack: RunningStack) -> None:
    def two_replicas() -> bool:
        # More than ten, as fewer say nothing of the load. One at a time, so by their number one
        # replica would do.
        for _ in range(12):
            assert _ask(stack, COLD_MODEL, stream=True).status_code == 200
        return len(stack.replicas(f"Model:{COLD_MODEL}")) == 2

    wait_until(two_replicas, "a second replica", _START_S)
