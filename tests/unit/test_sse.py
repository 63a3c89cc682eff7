"""The engine's stream: what is passed on, what is withheld, what is kept of it."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.completions.sse import (
    DONE,
    StreamReader,
    Usage,
    error_frame,
    pieces_of_stream,
    read_finish_reason,
    read_usage,
    text_of_answer,
)
from serve_app.errors import EngineFailed, to_openai


def frame(body: object) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"


def delta(text: str, finish: str | None = None, index: int = 0) -> bytes:
    choice = {"index": index, "delta": {"content": text}, "finish_reason": finish}
    return frame({"id": "x", "choices": [choice]})


USAGE = frame({"id": "x", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}})
ERROR = frame({"error": {"message": "out of memory", "code": 500}})
TOKENS = [delta(""), delta("Hello"), delta(" world"), delta("", "stop")]
# Each of these stands in a text, escaped as JSON escapes it.
MARKER_TEXTS = [
    '"usage":{"prompt_tokens":9,"completion_tokens":9}',
    '"finish_reason":"length"',
    'data: {"error": {"message": "no"}}',
    "data: [DONE]",
    "data: [DONE]\n\n",
]


class Read:
    """What a reader made of a stream."""

    def __init__(self, stream: bytes, cuts: list[int], *, wants_usage: bool) -> None:
        self.reader = StreamReader(wants_usage=wants_usage)
        ends = [*sorted(cuts), len(stream)]
        starts = [0, *ends]
        self.out = b"".join(
            self.reader.feed(stream[a:b]) for a, b in zip(starts, ends, strict=False)
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Read) and self._all() == other._all()

    def __repr__(self) -> str:
        return repr(self._all())

    def _all(self) -> tuple[object, ...]:
        r = self.reader
        return self.out, r.usage, r.finish_reason, r.done, r.frames, r.error


def read(stream: bytes, *, wants_usage: bool = False) -> Read:
    return Read(stream, [], wants_usage=wants_usage)


def test_done_and_usage_are_withheld() -> None:
    got = read(b"".join([*TOKENS, USAGE, DONE]))
    assert got.out == b"".join(TOKENS)
    assert got.reader.usage == Usage(3, 2)
    assert got.reader.finish_reason == "stop"
    assert got.reader.done
    assert got.reader.frames == len(TOKENS)


def test_usage_is_passed_on_where_it_was_asked_for() -> None:
    got = read(b"".join([*TOKENS, USAGE, DONE]), wants_usage=True)
    assert got.out == b"".join([*TOKENS, USAGE])


def test_stream_that_breaks_off_is_not_done() -> None:
    got = read(b"".join(TOKENS) + DONE[:-1])
    assert got.out == b"".join(TOKENS)
    assert not got.reader.done
    assert got.reader.usage is None


def test_comment_frames_are_passed_on() -> None:
    assert read(b": ping\n\n" + TOKENS[0]).out == b": ping\n\n" + TOKENS[0]


def test_error_frame_ends_what_is_passed_on() -> None:
    got = read(TOKENS[1] + ERROR + TOKENS[2] + DONE)
    assert got.out == TOKENS[1]
    assert got.reader.error is not None
    assert (got.reader.error.status, got.reader.error.message) == (500, "out of memory")
    assert got.reader.feed(TOKENS[3]) == b""
    assert got.reader.frames == 1


@pytest.mark.parametrize("error", [None, "text", {}, {"code": "x"}])
def test_error_frame_without_details(error: object) -> None:
    got = read(b'data: {"error":' + orjson.dumps(error) + b"}\n\n")
    assert got.reader.error is not None
    assert (got.reader.error.status, got.reader.error.message) == (500, "")


@pytest.mark.parametrize("text", MARKER_TEXTS)
def test_marker_inside_a_text_is_relayed_untouched(text: str) -> None:
    stream = delta(text) + delta("more")
    got = read(stream)
    assert got.out == stream
    assert got.reader.usage is None
    assert got.reader.finish_reason is None
    assert got.reader.error is None
    assert not got.reader.done


@pytest.mark.parametrize(
    "odd",
    [b"data: {broken\n\n", b'data: {"usage":{\n\n', b'data: ["usage":{}]\n\n', b"data: 1\n\n"],
)
def test_frame_that_is_no_json_object_is_passed_on(odd: bytes) -> None:
    got = read(odd + TOKENS[1])
    assert got.out == odd + TOKENS[1]
    assert list(pieces_of_stream(got.out)) == [(0, "Hello")]


_FRAMES = st.lists(
    st.one_of(
        st.sampled_from([*TOKENS, USAGE, ERROR, DONE, b": ping\n\n"]),
        st.text(st.characters(exclude_categories=["Cs"])).map(delta),
        st.sampled_from(MARKER_TEXTS).map(delta),
    ),
    max_size=8,
)


@given(frames=_FRAMES, wants_usage=st.booleans(), data=st.data())
def test_cutting_the_stream_changes_nothing(
    frames: list[bytes], wants_usage: bool, data: st.DataObject
) -> None:
    stream = b"".join(frames)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=6))
    assert Read(stream, cuts, wants_usage=wants_usage) == read(stream, wants_usage=wants_usage)


@pytest.mark.parametrize("wants_usage", [True, False])
def test_every_byte_boundary(wants_usage: bool) -> None:
    stream = b"".join([*TOKENS, *map(delta, MARKER_TEXTS), USAGE, DONE])
    whole = read(stream, wants_usage=wants_usage)
    for cut in range(len(stream) + 1):
        assert Read(stream, [cut], wants_usage=wants_usage) == whole
    assert Read(stream, list(range(len(stream))), wants_usage=wants_usage) == whole


@given(frames=_FRAMES, wants_usage=st.booleans())
def test_only_whole_frames_go_out_and_none_is_changed(
    frames: list[bytes], wants_usage: bool
) -> None:
    out = read(b"".join(frames), wants_usage=wants_usage).out
    passed = out.split(b"\n\n")[:-1]
    came = iter(b"".join(frames).split(b"\n\n"))
    assert all(one in came for one in passed)  # a subsequence, in order


# The small readers.


def test_our_error_as_a_frame() -> None:
    body = to_openai(EngineFailed())
    assert error_frame(body) == frame(body)
    assert read(error_frame(body)).reader.error is not None


@pytest.mark.parametrize(
    ("body", "usage"),
    [
        ({}, None),
        ({"usage": None}, None),
        ({"usage": {}}, Usage(0, 0)),
        ({"usage": {"prompt_tokens": 1, "completion_tokens": None}}, Usage(1, 0)),
    ],
)
def test_read_usage(body: dict[str, Any], usage: Usage | None) -> None:
    assert read_usage(body) == usage


def test_read_finish_reason() -> None:
    assert read_finish_reason({}) is None
    assert read_finish_reason({"choices": [{"finish_reason": None}]}) is None
    assert read_finish_reason({"choices": [{}, {"finish_reason": "stop"}]}) == "stop"


def test_pieces_of_stream_name_their_choices() -> None:
    stream = delta("a") + delta("x", index=1) + b": ping\n\n" + delta("b")
    assert list(pieces_of_stream(stream)) == [(0, "a"), (1, "x"), (0, "b")]


def test_pieces_of_completion_stream() -> None:
    texts = [frame({"choices": [{"index": 0, "text": text}]}) for text in ("a", "b")]
    assert list(pieces_of_stream(b"".join(texts))) == [(0, "a"), (0, "b")]


def test_text_of_answer() -> None:
    calls = [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]
    body = {
        "choices": [
            {"message": {"reasoning": "Hm. ", "content": "Yes."}},
            {"message": {"content": None, "tool_calls": calls}},
            {"text": "plain"},
        ]
    }
    assert text_of_answer(body) == f"Hm. Yes.\n\n{orjson.dumps(calls).decode()}\n\nplain"


@pytest.mark.parametrize("body", [{}, {"choices": None}, {"choices": [None, "x"]}])
def test_text_of_an_odd_answer_is_empty(body: dict[str, Any]) -> None:
    assert text_of_answer(body) == ""
