"""The fair queue: its order, its room, and that each entry leaves once."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve_app.config import Standing
from serve_app.queueing.fair_queue import Entry, FairQueue, QueueFull

PLENTY = 10_000
PRINCIPALS = ["ann", "ben", "cem", "dot"]
# Of powers of two, so that no tag is rounded.
WEIGHTS = st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0])


def push(
    queue: FairQueue[str],
    item: str,
    principal_id: str = "ann",
    *,
    priority: int = 0,
    weight: float = 1.0,
    places: int = PLENTY,
) -> Entry[str]:
    standing = Standing(priority=priority, weight=weight)
    return queue.push(item, principal_id, standing, places)


def drained(queue: FairQueue[str]) -> list[str]:
    found = []
    while (entry := queue.pop()) is not None:
        found.append(entry.item)
    return found


def test_one_principal_is_served_in_the_order_in_which_it_came() -> None:
    queue: FairQueue[str] = FairQueue()
    for n in range(5):
        assert push(queue, f"{n}").ahead == n
    assert drained(queue) == ["0", "1", "2", "3", "4"]


def test_one_with_many_waiting_does_not_delay_another_behind_them() -> None:
    queue: FairQueue[str] = FairQueue()
    for n in range(100):
        push(queue, f"batch-{n}", "batch")
    assert push(queue, "hello", "person").ahead == 1
    assert drained(queue)[:3] == ["batch-0", "hello", "batch-1"]


def test_one_that_asks_singly_is_not_served_twice_for_each_of_the_others() -> None:
    queue: FairQueue[str] = FairQueue()
    for n in range(10):
        push(queue, f"batch-{n}", "batch")
    order = []
    for _ in range(8):
        if "person" not in [entry.principal_id for entry in queue]:
            push(queue, "person", "person")
        entry = queue.pop()
        assert entry is not None
        order.append(entry.principal_id)
    assert Counter(order) == {"batch": 4, "person": 4}


def test_the_lower_priority_number_comes_first() -> None:
    queue: FairQueue[str] = FairQueue()
    push(queue, "batch", priority=100)
    push(queue, "usual")
    assert push(queue, "urgent", priority=-5).ahead == 0
    assert push(queue, "batch-too", "ben", priority=100).ahead == 3
    assert drained(queue) == ["urgent", "usual", "batch", "batch-too"]


def test_shares_follow_weights() -> None:
    queue: FairQueue[str] = FairQueue()
    for n in range(100):
        push(queue, f"{n}", "ann", weight=3)
        push(queue, f"{n}", "ben", weight=1)
    first = [queue.pop() for _ in range(80)]
    assert Counter(entry.principal_id for entry in first if entry) == {"ann": 60, "ben": 20}


def test_what_was_cancelled_costs_its_principal_nothing() -> None:
    queue: FairQueue[str] = FairQueue()
    cancelled = [push(queue, f"gone-{n}", "ann") for n in range(50)]
    push(queue, "ann", "ann")
    for n in range(3):
        push(queue, f"ben-{n}", "ben")
    assert all(queue.remove(entry) for entry in cancelled)
    assert not any(queue.remove(entry) for entry in cancelled)
    assert drained(queue)[:2] == ["ann", "ben-0"]


# Room.


def test_a_full_queue_refuses_the_one_that_fills_it() -> None:
    queue: FairQueue[str] = FairQueue()
    for n in range(4):
        push(queue, f"{n}", places=4)
    with pytest.raises(QueueFull):
        push(queue, "4", places=4)
    assert drained(queue) == ["0", "1", "2", "3"]


def test_a_newcomer_below_its_share_takes_the_newest_place_of_the_longest_line() -> None:
    queue: FairQueue[str] = FairQueue()
    for n in range(4):
        push(queue, f"batch-{n}", "batch", places=4)
    displaced = push(queue, "ben-0", "ben", places=4).displaced
    assert displaced is not None
    assert displaced.item == "batch-3"
    displaced = push(queue, "ben-1", "ben", places=4).displaced
    assert displaced is not None
    assert displaced.item == "batch-2"
    # Now it holds its half.
    with pytest.raises(QueueFull):
        push(queue, "ben-2", "ben", places=4)
    assert sorted(drained(queue)) == ["batch-0", "batch-1", "ben-0", "ben-1"]


def test_the_share_of_the_places_follows_the_weight() -> None:
    queue: FairQueue[str] = FairQueue()
    for n in range(8):
        push(queue, f"batch-{n}", "batch", places=8)
    for _ in range(6):
        push(queue, "ann", "ann", weight=3, places=8)
    with pytest.raises(QueueFull):
        push(queue, "ann", "ann", weight=3, places=8)
    assert Counter(entry.principal_id for entry in queue) == {"ann": 6, "batch": 2}


def test_one_more_urgent_takes_the_place_of_the_least_urgent() -> None:
    queue: FairQueue[str] = FairQueue()
    push(queue, "usual", "ann", places=2)
    push(queue, "batch", "ben", priority=100, places=2)
    displaced = push(queue, "usual-too", "ann", places=2).displaced
    assert displaced is not None
    assert displaced.item == "batch"
    with pytest.raises(QueueFull):
        push(queue, "batch-again", "cem", priority=100, places=2)


def test_no_place_at_all_refuses_everybody() -> None:
    with pytest.raises(QueueFull):
        push(FairQueue(), "one", places=0)


# What holds for every history.


@given(
    st.lists(st.tuples(st.sampled_from(PRINCIPALS), st.integers(-1, 1)), min_size=1, max_size=60),
    st.dictionaries(st.sampled_from(PRINCIPALS), WEIGHTS),
)
def test_who_is_ahead_is_who_is_served_first(
    arrivals: list[tuple[str, int]], weights: dict[str, float]
) -> None:
    queue: FairQueue[str] = FairQueue()
    for n, (principal, priority) in enumerate(arrivals):
        weight = weights.get(principal, 1.0)
        last = push(queue, f"{n}", principal, priority=priority, weight=weight)
    assert drained(queue).index(last.item) == last.ahead


@given(
    weights=st.lists(WEIGHTS, min_size=2, max_size=4),
    served=st.integers(1, 120),
)
def test_principals_that_always_wait_are_served_by_weight(
    weights: list[float], served: int
) -> None:
    """The bound of start-time fair queueing: no two drift apart by more than one service."""
    queue: FairQueue[str] = FairQueue()
    for index, weight in enumerate(weights):
        for n in range(served):
            push(queue, f"{n}", str(index), weight=weight)
    counts = Counter(queue.pop().principal_id for _ in range(served))  # type: ignore[union-attr]
    shares = [counts[str(index)] / weight for index, weight in enumerate(weights)]
    for index, share in enumerate(shares):
        for other, other_share in enumerate(shares):
            assert abs(share - other_share) <= 1 / weights[index] + 1 / weights[other]


@given(
    weight=WEIGHTS,
    others=st.lists(WEIGHTS, min_size=1, max_size=3),
    waiting=st.integers(0, 20),
    before=st.integers(0, 30),
)
def test_nobody_waits_for_ever_within_a_priority(
    weight: float, others: list[float], waiting: int, before: int
) -> None:
    """However much the others send, the head of a line is served after a bounded number."""
    queue: FairQueue[str] = FairQueue()

    def others_come() -> None:
        for index, other in enumerate(others):
            push(queue, "other", str(index), weight=other)

    for _ in range(waiting):
        others_come()
    for _ in range(before):
        others_come()
        queue.pop()
    push(queue, "mine", "mine", weight=weight)
    bound = sum(math.ceil(other / weight) + 1 for other in others) + 1
    order = []
    for _ in range(bound + 1):
        others_come()
        entry = queue.pop()
        assert entry is not None
        order.append(entry.item)
    assert "mine" in order


class Walk(RuleBasedStateMachine):
    """Any history: bounded, complete, in order of priority, first in first out in each line."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: FairQueue[str] = FairQueue()
        self.waiting: list[Entry[str]] = []
        self.left: Counter[Entry[str]] = Counter()
        self.places = 6
        self.number = 0

    def leave(self, entry: Entry[str]) -> None:
        self.waiting.remove(entry)
        self.left[entry] += 1

    @rule(
        principal=st.sampled_from(PRINCIPALS),
        priority=st.integers(0, 2),
        weight=WEIGHTS,
    )
    def push(self, principal: str, priority: int, weight: float) -> None:
        self.number += 1
        full = len(self.waiting) >= self.places
        try:
            entry = push(
                self.queue,
                f"{self.number}",
                principal,
                priority=priority,
                weight=weight,
                places=self.places,
            )
        except QueueFull:
            assert full
            return
        assert (entry.displaced is not None) == full
        if entry.displaced is not None:
            assert entry.displaced.priority >= priority
            if entry.displaced.priority == priority:
                assert entry.displaced.principal_id != principal
            self.leave(entry.displaced)
        self.waiting.append(entry)

    @rule()
    def pop(self) -> None:
        first = self.queue.first()
        entry = self.queue.pop()
        assert entry is first
        assert (entry is None) == (not self.waiting)
        if entry is None:
            return
        assert entry.priority == min(other.priority for other in self.waiting)
        line = [e for e in self.waiting if line_of(e) == line_of(entry)]
        assert line[0] is entry
        self.leave(entry)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.waiting))
        assert self.queue.remove(entry)
        self.leave(entry)

    @precondition(lambda self: self.left)
    @rule(data=st.data())
    def cancel_again(self, data: st.DataObject) -> None:
        assert not self.queue.remove(data.draw(st.sampled_from(list(self.left))))

    @invariant()
    def holds_what_waits(self) -> None:
        assert len(self.queue) == len(self.waiting) <= self.places
        assert list(self.queue) == self.waiting
        assert set(self.left.values()) <= {1}


def line_of(entry: Entry[str]) -> tuple[int, str]:
    return entry.priority, entry.principal_id


TestWalk = Walk.TestCase
TestWalk.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
