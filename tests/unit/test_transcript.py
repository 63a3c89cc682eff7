"""What is kept of a stream while it goes on."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterable

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.completions.answers import Answers
from serve_app.completions.transcript import Transcript


def frame(text: str, choice: int = 0, **more: object) -> bytes:
    body = {"choices": [{"index": choice, "delta": {"content": text}}], **more}
    return b"data: " + orjson.dumps(body) + b"\n\n"


def transcript(frames: Iterable[bytes], *, keep_frames: bool = False) -> Transcript:
    one = Transcript(Answers().pieces, keep_frames=keep_frames)
    for some in frames:
        one.add(some)
    return one


_TOKENS = st.lists(
    st.tuples(st.integers(0, 2), st.text(st.characters(codec="utf-8"), max_size=9)), max_size=40
)


@given(tokens=_TOKENS, filling=st.integers(0, 3000), keep_frames=st.booleans())
def test_text_is_the_same_whenever_it_was_read(
    tokens: list[tuple[int, str]], filling: int, keep_frames: bool
) -> None:
    frames = [frame(text, choice, filling="x" * filling) for choice, text in tokens]
    one = transcript(frames, keep_frames=keep_frames)
    choices = sorted({choice for choice, _ in tokens})
    texts = ["".join(text for of, text in tokens if of == choice) for choice in choices]
    expected = "\n\n".join(texts) if tokens else None
    # Asked twice, as it may be.
    assert (one.text, one.text) == (expected, expected)
    if keep_frames:
        assert one.frames == b"".join(frames)


def test_it_goes_on_after_it_was_asked() -> None:
    one = transcript([frame("a")], keep_frames=True)
    assert one.text == "a"
    one.add(frame("b"))
    assert (one.text, one.frames) == ("ab", frame("a") + frame("b"))


@pytest.mark.parametrize("odd", [b": ping\n\n", b"data: {broken\n\n", b"data: []\n\n"])
def test_what_holds_no_text_is_passed_over(odd: bytes) -> None:
    assert transcript([frame("a"), odd, frame("b")]).text == "ab"
    assert transcript([odd]).text == ""


def test_long_stream_costs_its_text_and_not_its_frames() -> None:
    token = frame(" word", id="chatcmpl-0123456789", model="m" * 100)
    tracemalloc.start()
    try:
        before_bytes, _ = tracemalloc.get_traced_memory()
        one = transcript(token for _ in range(20_000))
        after_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert one.text == " word" * 20_000
    # The frames are 4 MB, the text is 100 KB.
    assert after_bytes - before_bytes < 250_000
