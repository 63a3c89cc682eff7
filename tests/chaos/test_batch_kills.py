"""A batch goes on where the gateways that ran it were killed."""

from __future__ import annotations

import os
import signal

import httpx
import openai
import orjson
from openai.types import Batch

from tests.serve_configs import FAKE_MODEL
from tests.stack_runner import BOOTSTRAP_KEY, RunningStack, wait_until

_CHAT = "/v1/chat/completions"
_LINES = 600
_TOKENS = 20


def _line(number: int) -> bytes:
    body = {
        "model": FAKE_MODEL,
        "messages": [{"role": "user", "content": f"Line {number}"}],
        "max_tokens": _TOKENS,
    }
    custom_id = f"line-{number}"
    return orjson.dumps({"custom_id": custom_id, "method": "POST", "url": _CHAT, "body": body})


def _client(stack: RunningStack) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{stack.url}/v1",
        api_key=BOOTSTRAP_KEY,
        max_retries=10,
        http_client=httpx.Client(trust_env=False, timeout=60),
    )


def _completed(batch: Batch) -> int:
    assert batch.request_counts is not None
    return batch.request_counts.completed


def test_a_batch_outlives_every_gateway_that_runs_it(stack: RunningStack) -> None:
    wait_until(stack.ready, "ready before the batch", 60)
    with _client(stack) as ai:
        content = b"\n".join(_line(number) for number in range(_LINES))
        file = ai.files.create(file=("in.jsonl", content), purpose="batch")
        batch = ai.batches.create(input_file_id=file.id, endpoint=_CHAT, completion_window="24h")

        def now() -> Batch:
            return ai.batches.retrieve(batch.id)

        wait_until(lambda: _completed(now()) >= 60, "the batch runs", 120)
        os.kill(stack.replicas("Gateway")[0].pid, signal.SIGKILL)
        more = _completed(now()) + 60
        wait_until(lambda: _completed(now()) >= more, "the batch goes on", 120)
        for replica in stack.replicas("Gateway"):
            replica.kill()
        wait_until(stack.ready, "ready again", 120)
        before_the_end = _completed(now())
        assert before_the_end < _LINES
        wait_until(lambda: now().status == "completed", "the batch ends", 180)

        done = now()
        assert (_completed(done), done.error_file_id) == (_LINES, None)
        assert done.output_file_id is not None
        results = [
            orjson.loads(line) for line in ai.files.content(done.output_file_id).text.splitlines()
        ]
    assert [result["custom_id"] for result in results] == [f"line-{n}" for n in range(_LINES)]
    usages = {result["response"]["body"]["usage"]["completion_tokens"] for result in results}
    assert usages == {_TOKENS}
    # Every result has its row, under the request id that it names.
    ids = [result["response"]["request_id"] for result in results]
    stack.settled_rows(
        "select 1 from comp_ai.requests where request_id = any($1) and outcome = 'completed' "
        "group by request_id",
        _LINES,
        ids,
    )
