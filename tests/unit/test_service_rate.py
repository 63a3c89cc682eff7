"""The service rate and the advice made of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.queueing.service_rate import (
    LEAST_RETRY_AFTER_S,
    MOST_RETRY_AFTER_S,
    ServiceRate,
    retry_after_s,
)


class Clock:
    """Monotonic seconds that a test sets."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def served(rate: ServiceRate, clock: Clock, *, each_s: float, slots: int, rounds: int) -> None:
    """Hold `slots` leases for `each_s`, `rounds` times."""
    for _ in range(rounds):
        opened = [rate.opened() for _ in range(slots)]
        clock.now_s += each_s
        for opened_at_s in opened:
            rate.closed(opened_at_s)


def test_nothing_is_claimed_before_a_lease_was_closed() -> None:
    clock = Clock()
    rate = ServiceRate(clock)
    rate.opened()
    clock.now_s += 5
    assert rate.per_s() is None
    assert retry_after_s(3, None, 30) == 30


@pytest.mark.parametrize(("each_s", "slots"), [(2.0, 1), (0.01, 1), (10.0, 64)])
def test_it_is_the_number_of_leases_closed_a_second(each_s: float, slots: int) -> None:
    clock = Clock()
    rate = ServiceRate(clock)
    served(rate, clock, each_s=each_s, slots=slots, rounds=5)
    for _ in range(slots):
        rate.opened()
    assert rate.per_s() == pytest.approx(slots / each_s)


def test_idle_time_changes_nothing() -> None:
    clock = Clock()
    rate = ServiceRate(clock)
    served(rate, clock, each_s=2, slots=1, rounds=3)
    before = rate.per_s()
    clock.now_s += 3600
    assert rate.per_s() == before == pytest.approx(0.5)


def test_what_one_slot_did_holds_for_many() -> None:
    clock = Clock()
    rate = ServiceRate(clock)
    served(rate, clock, each_s=10, slots=1, rounds=3)
    for _ in range(20):
        rate.opened()
    assert rate.per_s() == pytest.approx(2.0)


def test_it_follows_a_change_of_speed() -> None:
    clock = Clock()
    rate = ServiceRate(clock)
    served(rate, clock, each_s=1, slots=1, rounds=200)
    served(rate, clock, each_s=10, slots=1, rounds=400)
    assert rate.per_s() == pytest.approx(0.1, rel=0.05)


def test_a_model_that_is_stuck_slows_it_down_before_anything_ends() -> None:
    clock = Clock()
    rate = ServiceRate(clock)
    served(rate, clock, each_s=1, slots=1, rounds=5)
    rate.opened()
    fresh = rate.per_s()
    clock.now_s += 100
    stuck = rate.per_s()
    assert fresh is not None
    assert stuck is not None
    assert stuck < fresh / 10


def test_leases_that_end_at_once_are_no_division_by_nothing() -> None:
    clock = Clock()
    rate = ServiceRate(clock)
    served(rate, clock, each_s=0, slots=3, rounds=3)
    assert retry_after_s(1000, rate.per_s(), 30) == LEAST_RETRY_AFTER_S


@given(ahead=st.integers(0, 10**6), rate=st.floats(1e-9, 1e9))
def test_the_advice_grows_with_the_queue_and_stays_in_bounds(ahead: int, rate: float) -> None:
    advice = retry_after_s(ahead, rate, 30)
    assert LEAST_RETRY_AFTER_S <= advice <= MOST_RETRY_AFTER_S
    assert advice <= retry_after_s(ahead + 1, rate, 30)
    assert advice >= retry_after_s(ahead, rate * 2, 30)
