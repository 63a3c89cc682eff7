"""The stream of response events: what passes, what is withheld, what is kept of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest

from serve_app.completions.response_events import (
    ResponseAnswers,
    ResponseReader,
    error_event,
    final_response,
    retold,
)
from serve_app.completions.sse import EngineError, Usage
from serve_app.completions.transcript import Transcript
from serve_app.fake_responses import FakeResponse

TRICKY = 'event: response.completed data: {"response"} \n\n event: response.created'


async def stream(words: list[str], asked: int = 99) -> list[bytes]:
    """Return the frames of a stream that says `words`."""

    async def said() -> AsyncIterator[str]:
        for word in words:
            yield word

    body = {"model": "small", "input": "Hi", "request_id": "resp_1"}
    return [frame async for frame in FakeResponse(body, 3, asked).frames(said())]


def read(reader: ResponseReader, frames: list[bytes]) -> bytes:
    """Feed `frames` one by one."""
    return b"".join(reader.feed(frame) for frame in frames)


async def test_all_but_the_last_event_pass_untouched() -> None:
    *frames, last = await stream(["a", "b"])
    reader = ResponseReader({})
    assert read(reader, [*frames, last]) == b"".join(frames)
    assert reader.done
    assert reader.closing == last
    assert (reader.usage, reader.finish_reason) == (Usage(3, 2), "stop")
    assert (reader.frames, reader.events) == (2, len(frames))
    assert reader.error is None


async def test_cut_at_any_place_it_reads_the_same() -> None:
    whole = b"".join(await stream(["a", TRICKY]))
    expected = ResponseReader({"store": True})
    passed = expected.feed(whole)
    assert expected.done
    for cut in range(len(whole) + 1):
        reader = ResponseReader({"store": True})
        assert reader.feed(whole[:cut]) + reader.feed(whole[cut:]) == passed
        assert reader.closing == expected.closing
        assert (reader.usage, reader.frames, reader.events) == (
            expected.usage,
            expected.frames,
            expected.events,
        )


async def test_byte_by_byte_it_reads_the_same() -> None:
    whole = b"".join(await stream(["a", TRICKY]))
    expected, reader = ResponseReader({}), ResponseReader({})
    passed = expected.feed(whole)
    assert b"".join(reader.feed(bytes([byte])) for byte in whole) == passed
    assert reader.closing == expected.closing


async def test_fields_are_told_wherever_the_response_stands() -> None:
    told = {"store": True, "previous_response_id": "resp_0"}
    reader = ResponseReader(told)
    passed = read(reader, await stream(["a"]))
    holders = [event for event in events(passed + reader.closing) if "response" in event]
    assert [one["type"] for one in holders] == [
        "response.created",
        "response.in_progress",
        "response.completed",
    ]
    for one in holders:
        assert told.items() <= one["response"].items()
        assert one["response"]["id"] == "resp_1"


def events(data: bytes) -> list[dict[str, Any]]:
    """Return the data of each frame, which must be named as its data says."""
    found = []
    for frame in data.decode().split("\n\n")[:-1]:
        name, _, text = frame.partition("\n")
        body = orjson.loads(text.removeprefix("data: "))
        assert name == f"event: {body['type']}"
        found.append(body)
    return found


async def test_answer_that_was_cut_at_its_limit() -> None:
    reader = ResponseReader({})
    read(reader, await stream(["a", "b"], asked=2))
    assert reader.done
    assert reader.finish_reason == "length"


async def test_stream_that_breaks_off_is_not_done() -> None:
    *frames, _ = await stream(["a", "b"])
    reader = ResponseReader({})
    read(reader, frames)
    assert not reader.done
    assert (reader.usage, reader.frames) == (None, 2)


@pytest.mark.parametrize(
    ("frame", "error"),
    [
        (
            b'event: response.failed\ndata: {"type":"response.failed","response":'
            b'{"error":{"code":"server_error","message":"Oh"}}}\n\n',
            EngineError(500, "Oh"),
        ),
        (b'event: error\ndata: {"type":"error","message":"Oh"}\n\n', EngineError(500, "Oh")),
        (b'event: error\ndata: {"error":{"code":400,"message":"Oh"}}\n\n', EngineError(400, "Oh")),
        (b"event: error\ndata: none\n\n", EngineError(500, "")),
    ],
)
async def test_nothing_passes_after_an_error(frame: bytes, error: EngineError) -> None:
    first, *others = await stream(["a"])
    reader = ResponseReader({})
    assert reader.feed(first + frame + b"".join(others)) == first
    assert (reader.error, reader.done) == (error, False)


async def test_error_goes_on_with_the_numbers_of_the_stream() -> None:
    first, second, *_ = await stream(["a"])
    reader = ResponseReader({})
    read(reader, [first, second])
    told = {"message": "Oh", "type": "api_error", "param": None, "code": "engine_error"}
    (event,) = events(ResponseAnswers().error_frame({"error": told}, reader))
    assert event == {
        "type": "error",
        "sequence_number": 2,
        "code": "engine_error",
        "message": "Oh",
        "param": None,
        "error": told,
    }
    assert events(error_event({"error": told}, 0))[0]["sequence_number"] == 0


ITEMS = [
    {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm."}]},
    {"type": "message", "content": [{"type": "output_text", "text": "Yes."}]},
    {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "c"},
]


def whole(**fields: Any) -> bytes:
    """Return a whole response."""
    usage = {"input_tokens": 3, "output_tokens": 2}
    return orjson.dumps({"status": "completed", "usage": usage, "output": [], **fields})


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "stop"),
        ({"output": ITEMS}, "tool_calls"),
        ({"status": "incomplete", "output": ITEMS}, "length"),
        ({"status": "failed"}, None),
    ],
)
def test_whole_answer_tells_usage_and_end(fields: dict[str, Any], reason: str | None) -> None:
    read = ResponseAnswers().read(whole(**fields))
    assert (read.usage, read.finish_reason) == (Usage(3, 2), reason)


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b'{"usage": 1}'])
def test_answer_that_is_none_tells_nothing(raw: bytes) -> None:
    read = ResponseAnswers().read(raw)
    assert (read.usage, read.finish_reason) == (None, None)
    assert ResponseAnswers().text(raw) == ""


def test_text_of_a_whole_answer() -> None:
    text = ResponseAnswers().text(whole(output=ITEMS))
    assert text == 'Hm.\n\nYes.\n\n{"name":"f","arguments":"{}"}'


def said(frames: bytes) -> str | None:
    transcript = Transcript(ResponseAnswers().pieces)
    transcript.add(frames)
    return transcript.text


async def test_text_of_a_stream_is_said_once() -> None:
    reader = ResponseReader({})
    passed = read(reader, await stream(["a ", TRICKY]))
    assert said(passed) == f"a {TRICKY}"


def test_text_of_a_stream_holds_reasoning_and_calls() -> None:
    events = [
        {"type": "response.reasoning_text.delta", "delta": "Hm."},
        {"type": "response.function_call_arguments.delta", "delta": "{"},
        {"type": "response.output_item.done", "item": ITEMS[2]},
        {"type": "response.output_item.done", "item": ITEMS[1]},
    ]
    data = b"".join(
        b"event: " + one["type"].encode() + b"\ndata: " + orjson.dumps(one) + b"\n\n"
        for one in events
    )
    assert said(data) == 'Hm.{"name":"f","arguments":"{}"}'


async def test_final_response_of_both_forms_and_its_retelling() -> None:
    *_, last = await stream(["a"])
    for form in (last, orjson.dumps(final_response(last))):
        assert final_response(form)["id"] == "resp_1"
        again = retold(form, {"store": False})
        assert final_response(again) == {**final_response(form), "store": False}
        assert again.startswith(form[:8])
