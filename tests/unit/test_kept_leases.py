"""Idle leases: who gets which, and when each is closed. Time is the test's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from unittest.mock import Mock

import pytest

from serve_app.contracts import LeaseGrant
from serve_app.queueing.kept import IDLE_S, OLDEST_S, KeptLeases, OpenLease


class Time:
    """A clock, and what is to be called later."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.due: list[tuple[float, Callable[[], None]]] = []

    def clock_s(self) -> float:
        """Return the time."""
        return self.now_s

    def later(self, delay_s: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        """See `Later`."""
        timer = (self.now_s + delay_s, callback)
        self.due.append(timer)
        return Mock(cancel=lambda: self.due.remove(timer))

    def pass_(self, seconds: float) -> None:
        """Let time pass, and call what is due."""
        self.now_s += seconds
        for timer in [one for one in self.due if one[0] <= self.now_s]:
            self.due.remove(timer)
            timer[1]()


class Lease:
    """A lease that knows whether it is held."""

    def __init__(self, replica_id: str, may_keep: int) -> None:
        self.grant = LeaseGrant(address="a", token="t", replica_id=replica_id, may_keep=may_keep)
        self.closed = 0

    def close(self) -> None:
        """Give it back."""
        self.closed += 1


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def kept(time: Time) -> KeptLeases:
    return KeptLeases(time.clock_s, time.later)


def opened(time: Time, replica_id: str = "r", *, may_keep: int = 8, age_s: float = 0) -> OpenLease:
    return OpenLease(Lease(replica_id, may_keep), time.now_s - age_s)


def closed(one: OpenLease) -> int:
    assert isinstance(one.lease, Lease)
    return one.lease.closed


def test_last_that_came_goes_first(time: Time, kept: KeptLeases) -> None:
    one, two = opened(time), opened(time)
    kept.keep(one)
    kept.keep(two)
    assert (kept.take(), kept.take(), kept.take()) == (two, one, None)
    assert (one.rested, closed(one), closed(two)) == (True, 0, 0)


def test_no_more_of_a_replica_are_kept_than_it_allows(time: Time, kept: KeptLeases) -> None:
    leases = [opened(time, may_keep=2) for _ in range(3)]
    other = opened(time, "other", may_keep=1)
    for one in (*leases, other):
        kept.keep(one)
    assert [closed(one) for one in (*leases, other)] == [0, 0, 1, 0]
    kept.take()
    kept.take()
    kept.keep(leases[1])
    assert (len(kept), closed(leases[1])) == (2, 0)


def test_one_that_may_not_be_kept_is_closed(time: Time, kept: KeptLeases) -> None:
    one = opened(time, may_keep=0)
    kept.keep(one)
    assert (closed(one), len(kept), time.due) == (1, 0, [])


def test_idle_ones_are_closed_in_time_with_one_timer(time: Time, kept: KeptLeases) -> None:
    first = opened(time)
    kept.keep(first)
    time.pass_(IDLE_S / 2)
    second = opened(time)
    kept.keep(second)
    assert len(time.due) == 1
    time.pass_(IDLE_S / 2)
    assert (closed(first), closed(second)) == (1, 0)
    time.pass_(IDLE_S / 2)
    assert (closed(first), closed(second), time.due) == (1, 1, [])


def test_time_begins_anew_with_each_rest_but_not_the_age(time: Time, kept: KeptLeases) -> None:
    one = opened(time)
    step_s = IDLE_S * 0.75
    for _ in range(int(OLDEST_S / step_s)):
        kept.keep(one)
        time.pass_(step_s)
        assert kept.take() is one
    kept.keep(one)
    assert closed(one) == 0
    time.pass_(step_s)
    assert (kept.take(), closed(one)) == (None, 1)


def test_one_that_is_too_old_is_not_kept(time: Time, kept: KeptLeases) -> None:
    one = opened(time, age_s=OLDEST_S)
    kept.keep(one)
    assert closed(one) == 1


def test_overdue_one_is_not_handed_out_though_the_timer_is_late(
    time: Time, kept: KeptLeases
) -> None:
    one = opened(time)
    kept.keep(one)
    time.now_s += IDLE_S
    assert (kept.take(), closed(one)) == (None, 1)
    time.pass_(IDLE_S)
    assert closed(one) == 1


def test_those_of_a_replica_can_be_closed(time: Time, kept: KeptLeases) -> None:
    bad, good = opened(time, "bad"), opened(time, "good")
    kept.keep(good)
    kept.keep(bad)
    kept.close_of("bad")
    assert (closed(bad), closed(good), len(kept)) == (1, 0, 1)


def test_closing_closes_all_and_stops_the_timer(time: Time, kept: KeptLeases) -> None:
    one, two = opened(time), opened(time)
    kept.keep(one)
    kept.keep(two)
    kept.close()
    assert (closed(one), closed(two), len(kept), time.due) == (1, 1, 0, [])
