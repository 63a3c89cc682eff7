"""A stuck engine is told from a busy, a slow and an idle one."""

from __future__ import annotations

import pytest

from serve_app.engine_watch import EngineStuck, EngineWatch


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watch(clock: Clock) -> EngineWatch:
    return EngineWatch(60, clock)


def test_requests_without_progress_for_long_enough_are_stuck(
    watch: EngineWatch, clock: Clock
) -> None:
    watch.look(3, progress=7)
    clock.now_s += 59.9
    watch.look(3, progress=7)
    clock.now_s += 0.1
    with pytest.raises(EngineStuck, match="3 requests and no step for 60 s"):
        watch.look(3, progress=7)
    clock.now_s += 1
    with pytest.raises(EngineStuck):
        watch.look(3, progress=7)


def test_a_slow_engine_is_not_stuck(watch: EngineWatch, clock: Clock) -> None:
    for step in range(20):
        watch.look(1, progress=step)
        clock.now_s += 59


def test_an_idle_engine_is_not_stuck_nor_is_its_first_request(
    watch: EngineWatch, clock: Clock
) -> None:
    for _ in range(10):
        watch.look(0, progress=7)
        clock.now_s += 100
    watch.look(1, progress=7)
    clock.now_s += 59
    watch.look(1, progress=7)


def test_time_counts_from_the_last_step(watch: EngineWatch, clock: Clock) -> None:
    watch.look(1, progress=1)
    clock.now_s += 50
    watch.look(1, progress=2)
    clock.now_s += 50
    watch.look(1, progress=2)
    clock.now_s += 10
    with pytest.raises(EngineStuck):
        watch.look(1, progress=2)


def test_an_engine_that_finished_starts_anew(watch: EngineWatch, clock: Clock) -> None:
    watch.look(1, progress=1)
    clock.now_s += 50
    watch.look(0, progress=1)
    clock.now_s += 50
    watch.look(1, progress=1)
    clock.now_s += 50
    watch.look(1, progress=1)
