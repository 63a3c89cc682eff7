"""The engine of the simulated day does what its speeds say."""

from __future__ import annotations

import pytest

from load_tests.autoscaling.engine import Job, Replica, Speed
from load_tests.autoscaling.trace import DAY_S, Request, bursty_day

SPEED = Speed(
    prompt_tokens_per_s=1000, step_s=0.01, sequence_s=0.001, chunk_tokens=1000, sequences=1
)


class Run:
    """A replica and its time."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.replica = Replica(speed=SPEED, clock_s=lambda: self.now_s, asked_at_s=0, ready_at_s=0)

    def until_done(self) -> None:
        while self.replica.ongoing:
            self.now_s = self.replica.next_s()
            self.replica.advance(self.now_s)
            self.replica.settle()


def test_a_prompt_is_read_then_answered() -> None:
    run, job = Run(), Job(Request(0, prompt_tokens=2000, answer_tokens=101))
    run.replica.take(job)
    run.until_done()
    # Two chunks of a second, each with the step's base time; then a hundred steps of 11 ms.
    assert job.first_token_at_s == pytest.approx(2.02)
    assert run.now_s == pytest.approx(2.02 + 1.1)
    told = run.replica.read()
    assert told["tokens_per_s"] == pytest.approx(2100 / 3.12, rel=0.01)


def test_who_finds_no_place_waits_for_one() -> None:
    run = Run()
    first, second = (Job(Request(0, prompt_tokens=1000, answer_tokens=101)) for _ in range(2))
    run.replica.take(first)
    run.replica.take(second)
    assert run.replica.read()["waiting"] == 1
    run.until_done()
    assert second.begun_at_s == pytest.approx(1.01 + 1.1)
    assert second.first_token_at_s == pytest.approx(second.begun_at_s + 1.01)


def test_same_seed_is_the_same_day() -> None:
    day = bursty_day(7, busiest_per_s=0.2)
    assert day == bursty_day(7, busiest_per_s=0.2)
    assert all(0 <= request.at_s < DAY_S for request in day)
    assert bursty_day(8, busiest_per_s=0.2) != day
