"""What a replica measures for the autoscaler."""

from __future__ import annotations

from serve_app.engine_counters import EngineCounters
from serve_app.scaling.readings import WINDOW_S, FirstTokens, LoadReadings


class Clock:
    """A clock that is set."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_quantile_and_rate_are_of_the_window() -> None:
    clock = Clock()
    first_tokens = FirstTokens(clock)
    for tenths in range(1, 11):
        first_tokens.note(tenths / 10)
    first_tokens.note(None)
    assert first_tokens.quantile_s() == 0.9
    assert first_tokens.per_s() == 11 / WINDOW_S
    clock.now_s += WINDOW_S
    assert first_tokens.quantile_s() == 0
    assert first_tokens.per_s() == 0


def test_few_first_tokens_say_nothing() -> None:
    first_tokens = FirstTokens(Clock())
    for _ in range(9):
        first_tokens.note(60.0)
    assert first_tokens.quantile_s() == 0


def test_tokens_are_counted_from_one_reading_to_the_next() -> None:
    clock = Clock()
    load = LoadReadings(FirstTokens(clock), clock)
    clock.now_s += 2
    counters = EngineCounters(prompt_tokens=500, completion_tokens=100, requests_waiting=3)
    first = load.read(counters)
    assert (first["tokens_per_s"], first["waiting"]) == (300, 3)
    assert load.read(counters)["tokens_per_s"] == 0
    clock.now_s += 5
    assert load.read(counters)["tokens_per_s"] == 0
