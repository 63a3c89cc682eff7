"""The responses API with the official client, the real model, two gateways, through nginx."""

from __future__ import annotations

import time
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.responses import Response

from tests.e2e.conftest import create_key
from tests.serve_configs import ANSWER, QUESTION, REAL_MODEL
from tests.stack_runner import RunningStack, wait_until

_UNDER_WAY = ("queued", "in_progress")
_TOOL: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def ask(**more: Any) -> Any:
    """Return what a request is made of."""
    return {
        "model": REAL_MODEL,
        "input": QUESTION,
        "max_output_tokens": 16,
        "temperature": 0,
        **more,
    }


def ended(client: OpenAI, response: Response) -> Response:
    """Poll a background response until it has ended."""
    deadline = time.monotonic() + 60
    while response.status in _UNDER_WAY and time.monotonic() < deadline:
        response = client.responses.retrieve(response.id)
    return response


def row_of(stack: RunningStack, response_id: str) -> Any:
    """Return the row of the request that made a response."""
    query = "select * from comp_ai.requests where replace(id::text, '-', '') = $1"
    [row] = stack.settled_rows(query, 1, response_id.removeprefix("resp_"))
    return row


def test_whole_answer_is_stored(stack: RunningStack, client: OpenAI) -> None:
    made = client.responses.create(**ask())
    assert made.output_text == ANSWER
    assert made.usage is not None
    row = row_of(stack, made.id)
    assert (row["route"], row["outcome"]) == ("responses", "completed")
    assert (row["prompt_tokens"], row["completion_tokens"]) == (
        made.usage.input_tokens,
        made.usage.output_tokens,
    )
    # Either gateway finds it.
    for _ in range(4):
        assert client.responses.retrieve(made.id).to_dict() == made.to_dict()
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_stream_says_the_same(stack: RunningStack, client: OpenAI) -> None:
    whole = client.responses.create(**ask(store=False))
    with client.responses.stream(**ask()) as stream:
        texts = [e.delta for e in stream if e.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(texts) == final.output_text == whole.output_text
    assert final.usage is not None
    row = row_of(stack, final.id)
    assert row["stream"]
    assert row["completion_tokens"] == final.usage.output_tokens
    kept = client.responses.retrieve(final.id)
    # The client's helper adds what it parsed to its own copy.
    assert (kept.status, kept.output_text) == (final.status, final.output_text)
    assert kept.usage == final.usage


def test_conversation_is_what_the_items_would_be(client: OpenAI) -> None:
    first = client.responses.create(**ask())
    second = client.responses.create(**ask(input="And of Spain?", previous_response_id=first.id))
    items: Any = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And of Spain?"},
    ]
    flat = client.responses.create(**ask(input=items, store=False))
    assert second.usage is not None
    assert flat.usage is not None
    assert second.usage.input_tokens == flat.usage.input_tokens
    assert second.output_text == flat.output_text
    listed = list(client.responses.input_items.list(second.id, order="asc"))
    assert [getattr(one, "role", None) for one in listed] == ["user", "assistant", "user"]


def test_tool_call_and_its_output_go_back(client: OpenAI) -> None:
    first = client.responses.create(
        **ask(tools=[_TOOL], tool_choice="required", max_output_tokens=64)
    )
    [call] = [one for one in first.output if one.type == "function_call"]
    assert call.name == "get_weather"
    output: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
    second = client.responses.create(**ask(input=output, previous_response_id=first.id))
    assert second.status in ("completed", "incomplete")
    listed = list(client.responses.input_items.list(second.id, order="asc"))
    assert [one.type for one in listed] == ["message", "function_call", "function_call_output"]


def test_background(stack: RunningStack, client: OpenAI) -> None:
    queued = client.responses.create(**ask(background=True))
    assert queued.status == "queued"
    done = ended(client, queued)
    assert done.output_text == ANSWER
    assert done.id == queued.id


def test_cancel_stops_the_engine(stack: RunningStack, client: OpenAI) -> None:
    long = ask(background=True, max_output_tokens=2000, extra_body={"ignore_eos": True})
    queued = client.responses.create(**long)
    wait_until(lambda: stack.engine(REAL_MODEL)["requests_running"] > 0, "it runs", 60)
    assert client.responses.cancel(queued.id).status == "cancelled"
    wait_until(lambda: stack.engine(REAL_MODEL)["requests_running"] == 0, "it was stopped", 15)
    assert client.responses.retrieve(queued.id).status == "cancelled"


def test_client_that_leaves_stops_the_engine(stack: RunningStack, client: OpenAI) -> None:
    long = ask(stream=True, max_output_tokens=2000, extra_body={"ignore_eos": True})
    with client.responses.create(**long) as stream:
        for event in stream:
            if event.type == "response.created":
                made = event.response
            if event.type == "response.output_text.delta":
                break
    wait_until(lambda: stack.engine(REAL_MODEL)["requests_running"] == 0, "it was stopped", 5)
    row = row_of(stack, made.id)
    assert (row["status"], row["outcome"]) == (499, "cancelled")
    assert row["prompt_tokens"] > 0
    assert row["completion_tokens"] > 0


def test_another_principal_does_not_find_it(stack: RunningStack, client: OpenAI) -> None:
    made = client.responses.create(**ask())
    url = f"{stack.url}/v1"
    other = OpenAI(base_url=url, api_key=create_key(stack, "somebody-else"), max_retries=0)
    with pytest.raises(openai.NotFoundError):
        other.responses.retrieve(made.id)
