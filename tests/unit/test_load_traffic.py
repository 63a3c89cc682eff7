"""The parts of the load tests that need neither Locust nor a service."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from load_tests.shapes import SHAPES, users_at
from load_tests.sse import Answer, End, EventReader, read_stream
from load_tests.thresholds import Measured, Thresholds
from load_tests.traffic import KINDS, Arrival, arrivals, length_at, read_trace

# Server-sent events.


class Script:
    """Frames that come at set times: reading one moves the clock there."""

    def __init__(self, *frames: tuple[float, str]) -> None:
        self._frames = frames
        self.now_s = 100.0
        self.read = 0

    def clock(self) -> float:
        return self.now_s

    def __iter__(self) -> Iterator[bytes]:
        for at_s, frame in self._frames:
            self.now_s = 100.0 + at_s
            self.read += 1
            yield frame.encode()


def frame(text: str | None, **delta: Any) -> str:
    choice = {"index": 0, "delta": {"content": text, **delta}}
    return f"data: {json.dumps({'choices': [choice]})}\n\n"


USAGE = 'data: {"choices": [], "usage": {"completion_tokens": 3}}\n\n'
DONE = "data: [DONE]\n\n"


def read(script: Script, **more: Any) -> Answer:
    answer = Answer()
    read_stream(script, answer, begun_at=100.0, clock=script.clock, **more)
    return answer


def test_the_first_token_and_the_gaps_are_timed_and_nothing_else_is() -> None:
    script = Script(
        (0.1, frame("", role="assistant")),
        (0.2, ": keep-alive\n\n"),
        (0.5, frame("a")),
        (0.75, frame("b")),
        (1.75, frame("c")),
        (1.8, frame("")),
        (1.9, USAGE),
        (2.0, DONE),
    )
    answer = read(script)
    assert answer.first_token_s == pytest.approx(0.5)
    assert answer.gaps_s == pytest.approx([0.25, 1.0])
    assert (answer.tokens, answer.end) == (3, End.DONE)


def test_tokens_that_came_in_one_piece_have_no_gap() -> None:
    answer = read(Script((0.5, frame("a") + frame("b")), (0.6, DONE)))
    assert answer.gaps_s == [0.0]


@pytest.mark.parametrize("said", [{"reasoning": "hm"}, {"tool_calls": [{"index": 0}]}])
def test_thoughts_and_calls_are_tokens_too(said: dict[str, Any]) -> None:
    assert read(Script((0.5, frame(None, **said)), (0.6, DONE))).tokens == 1


def test_texts_of_completions_are_tokens() -> None:
    assert read(Script((0.5, 'data: {"choices": [{"text": "a"}]}\n\n'), (0.6, DONE))).tokens == 1


def test_who_leaves_reads_no_further() -> None:
    script = Script((0.1, frame("a")), (0.2, frame("b")), (0.3, frame("c")), (0.4, DONE))
    answer = read(script, leave_after_tokens=2)
    assert (answer.end, answer.tokens, script.read) == (End.LEFT, 2, 2)


def test_an_error_frame_is_a_failure_with_its_code() -> None:
    script = Script((0.1, frame("a")), (0.2, 'data: {"error": {"code": "engine_error"}}\n\n'))
    answer = read(script)
    assert (answer.end, answer.code) == (End.FAILED, "engine_error")


def test_a_stream_without_its_last_frame_was_cut() -> None:
    assert read(Script((0.1, frame("a")))).end is End.CUT


def test_events_may_come_in_any_pieces() -> None:
    whole = b"data: one\r\n\r\n: no event\n\ndata: two\ndata: more\n\nevent: x\ndata: three\n\n"
    for size in range(1, len(whole) + 1):
        reader = EventReader()
        pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
        found = [data for piece in pieces for data in reader.feed(piece)]
        assert found == [b"one", b"two\nmore", b"three"], size


# Traffic.


@pytest.mark.parametrize("name", KINDS)
def test_arrivals_have_the_quantiles_of_their_trace(name: str) -> None:
    kind = KINDS[name]
    found = list(arrivals(kind, per_s=5, length_s=4000, seed=3))
    assert len(found) == pytest.approx(5 * 4000, rel=0.25)
    for of, quantiles in (
        ([one.prompt_tokens for one in found], kind.prompt_tokens),
        ([one.answer_tokens for one in found], kind.answer_tokens),
    ):
        assert statistics.median(of) == pytest.approx(quantiles[4], rel=0.06)
        assert quantiles[0] <= min(of) <= max(of) <= quantiles[-1]


@pytest.mark.parametrize("name", KINDS)
def test_arrivals_come_in_bursts_as_in_their_trace(name: str) -> None:
    kind = KINDS[name]
    counts = [0] * 2000
    for one in arrivals(kind, per_s=5, length_s=20_000, seed=3):
        counts[int(one.at_s // 10)] += 1
    variation = statistics.pstdev(counts) / statistics.mean(counts)
    assert variation == pytest.approx(kind.variation, rel=0.15)


def test_arrivals_are_in_order_and_the_same_for_a_seed() -> None:
    kind = KINDS["conversation"]
    once, again, other = (
        list(arrivals(kind, per_s=2, length_s=100, seed=seed)) for seed in (1, 1, 2)
    )
    assert once == again != other
    assert all(before.at_s <= after.at_s for before, after in itertools.pairwise(once))
    assert once[-1].at_s < 100


def test_lengths_lie_between_their_quantiles() -> None:
    quantiles = KINDS["code"].answer_tokens
    assert [length_at(quantiles, part) for part in (0.0, 0.5, 1.0)] == [6, 13, 1899]
    assert length_at(quantiles, 0.7) == round(13 + 0.8 * (24 - 13))
    with pytest.raises(ValueError, match="no part"):
        length_at(quantiles, 1.1)


def test_a_trace_is_read_with_its_times(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.6805900,396,109\n"
    )
    assert list(read_trace(file, faster=2)) == [Arrival(0.0, 374, 44), Arrival(2.0, 396, 109)]


# Shapes.


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_has_users_from_beginning_to_end_and_never_more_than_all(shape: str) -> None:
    users = [users_at(shape, at_s, length_s=600, most=50) for at_s in range(600)]
    assert all(number is not None and 1 <= number <= 50 for number in users)
    assert users_at(shape, 600, length_s=600, most=50) is None


def test_shapes_are_what_they_are_called() -> None:
    def at(shape: str, part: float) -> int | None:
        return users_at(shape, part * 1000, length_s=1000, most=100)

    assert [at("step", part) for part in (0, 0.2, 0.4, 0.6, 0.8)] == [20, 40, 60, 80, 100]
    assert [at("spike", part) for part in (0.3, 0.45, 0.6)] == [20, 100, 20]
    assert [at("soak", part) for part in (0.025, 0.05, 0.99)] == [35, 70, 70]
    assert at("day", 10 / 24) == 100
    assert at("day", 3 / 24) == 4


# Thresholds.


def measured(**change: Any) -> Measured:
    seen = {"requests": 1000, "failures": 5, "first_token_p95_ms": 80.0, "gap_p99_ms": 12.0}
    return Measured(**{**seen, **change})


ALL = Thresholds(failures_percent=1, first_token_p95_ms=100, gap_p99_ms=20)


def test_a_run_within_its_thresholds_breaks_none() -> None:
    assert list(ALL.broken_by(measured())) == []
    assert list(Thresholds().broken_by(measured(first_token_p95_ms=None, gap_p99_ms=9e9))) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"failures": 11}, "1.10 % of the requests failed, over 1 %"),
        ({"first_token_p95_ms": 101.0}, "time to first token, p95: 101 ms, over 100 ms"),
        ({"gap_p99_ms": 20.5}, "inter-token latency, p99: 20.5 ms, over 20 ms"),
        ({"gap_p99_ms": None}, "inter-token latency, p99: nothing was measured"),
        ({"requests": 0, "failures": 0}, "no request was answered"),
    ],
)
def test_what_is_broken_is_said(change: dict[str, Any], said: str) -> None:
    assert list(ALL.broken_by(measured(**change))) == [said]
