"""Files and batches with the official client's own methods and the real model."""

from __future__ import annotations

import openai
import orjson
import pytest
from openai import OpenAI
from openai.types import Batch

from tests.serve_configs import ANSWER, QUESTION, REAL_MODEL
from tests.stack_runner import RunningStack, wait_until

_CHAT = "/v1/chat/completions"
_ENDED = ("completed", "failed", "cancelled", "expired")


def _line(custom_id: str, question: str, **more: object) -> bytes:
    body = {
        "model": REAL_MODEL,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 8,
        "temperature": 0,
        **more,
    }
    return orjson.dumps({"custom_id": custom_id, "method": "POST", "url": _CHAT, "body": body})


def _started(client: OpenAI, *lines: bytes) -> Batch:
    file = client.files.create(file=("in.jsonl", b"\n".join(lines)), purpose="batch")
    assert client.files.retrieve(file.id).filename == "in.jsonl"
    assert file.id in [known.id for known in client.files.list()]
    return client.batches.create(
        input_file_id=file.id, endpoint=_CHAT, completion_window="24h", metadata={"for": "e2e"}
    )


def _ended(client: OpenAI, batch: Batch) -> Batch:
    wait_until(lambda: client.batches.retrieve(batch.id).status in _ENDED, "the batch ends", 120)
    return client.batches.retrieve(batch.id)


def test_batch_is_answered_by_the_real_model(stack: RunningStack, client: OpenAI) -> None:
    batch = _started(
        client,
        _line("right", QUESTION),
        # It passes the check of the file; the engine finds that the prompt is too long.
        _line("wrong", "long " * 9000),
    )
    assert batch.id in [known.id for known in client.batches.list()]
    done = _ended(client, batch)
    assert (done.status, done.metadata) == ("completed", {"for": "e2e"})
    assert done.request_counts is not None
    assert (done.request_counts.completed, done.request_counts.failed) == (1, 1)
    assert done.output_file_id is not None
    assert done.error_file_id is not None
    [right] = client.files.content(done.output_file_id).text.splitlines()
    [wrong] = client.files.content(done.error_file_id).text.splitlines()
    answer = orjson.loads(right)["response"]
    assert answer["status_code"] == 200
    assert answer["body"]["choices"][0]["message"]["content"] == ANSWER
    refused = orjson.loads(wrong)
    assert (refused["custom_id"], refused["response"]["status_code"]) == ("wrong", 400)
    [row] = stack.settled_rows(
        "select principal_id, completion_tokens from comp_ai.requests where request_id = $1",
        1,
        answer["request_id"],
    )
    usage = answer["body"]["usage"]
    assert dict(row) == {
        "principal_id": "developer",
        "completion_tokens": usage["completion_tokens"],
    }
    client.files.delete(done.output_file_id)
    with pytest.raises(openai.NotFoundError):
        client.files.content(done.output_file_id)


def test_batch_that_is_cancelled_stops(client: OpenAI) -> None:
    lines = [
        _line(f"line-{number}", "Count.", max_tokens=200, min_tokens=200) for number in range(40)
    ]
    batch = _started(client, *lines)
    wait_until(lambda: client.batches.retrieve(batch.id).status == "in_progress", "it runs", 60)
    client.batches.cancel(batch.id)
    done = _ended(client, batch)
    assert done.status == "cancelled"
    assert done.request_counts is not None
    assert done.request_counts.completed < len(lines)
    assert done.error_file_id is not None
    errors = client.files.content(done.error_file_id).text.splitlines()
    assert {orjson.loads(line)["error"]["code"] for line in errors} == {"batch_cancelled"}
