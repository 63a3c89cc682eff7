"""The queue in front of a pool that does as it is told: nothing is lost, kept or given twice."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from typing import TypeVar
from unittest.mock import Mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve_app.config import ModelEntry, QueueConfig, Standing
from serve_app.contracts import Lease, LeaseGrant, LeaseHint, ModelState
from serve_app.errors import ModelNotReady, ModelOverloaded
from serve_app.metrics import NoMetrics
from serve_app.queueing.line import HeldLease, Line
from serve_app.queueing.pool import QueuedPool
from serve_app.queueing.ticket import Ticket

MODEL = ModelEntry(name="small", app="app-small")
ADAPTER = ModelEntry(name="adapter", app="app-small")
AT_RAY = 3
PLACES = 6
# More turns of the loop than a grant, a cancellation and a new call need one after the other.
_TURNS = 12


class ScriptedLease:
    """A lease that knows whether it is held."""

    def __init__(self, number: int, held: set[int], may_keep: int) -> None:
        self._number = number
        self._held = held
        self.grant = LeaseGrant(address="a", token=str(number), replica_id="r", may_keep=may_keep)
        held.add(number)

    def close(self) -> None:
        """Give it back; the second time is a fault."""
        self._held.remove(self._number)


class ScriptedPool:
    """Grants and fails when the test says so."""

    def __init__(self) -> None:
        self.asking: list[asyncio.Future[Lease]] = []
        self.held: set[int] = set()
        self.granted = 0
        self.state_now = ModelState.SERVING

    async def open(self, model: ModelEntry, hint: LeaseHint) -> Lease:
        """See `ModelPool.open`."""
        slot: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        self.asking.append(slot)
        try:
            return await slot
        except asyncio.CancelledError:
            # The contract: a slot that was granted in that moment is given back.
            if slot.done() and not slot.cancelled() and slot.exception() is None:
                slot.result().close()
            raise
        finally:
            if slot in self.asking:
                self.asking.remove(slot)

    async def state(self, model: ModelEntry) -> ModelState:
        """See `ModelPool.state`."""
        return self.state_now

    async def close(self) -> None:
        """See `ModelPool.close`."""

    def grant(self, may_keep: int = 0) -> int:
        """Grant the oldest call; return the number of the lease."""
        self.granted += 1
        self.asking.pop(0).set_result(ScriptedLease(self.granted, self.held, may_keep))
        return self.granted

    def fail(self, error: Exception) -> None:
        """Fail the oldest call."""
        self.asking.pop(0).set_exception(error)


def ticket(
    principal_id: str = "ann",
    *,
    priority: int = 0,
    model: ModelEntry = MODEL,
    fresh: bool = False,
) -> Ticket:
    standing = Standing(priority=priority)
    return Ticket(
        model=model,
        hint=LeaseHint(request_id="r", principal_id=principal_id, standing=standing),
        queue=QueueConfig(max_waiting=PLACES, at_ray=AT_RAY),
        timeout_s=3600,
        fresh=fresh,
    )


async def turns() -> None:
    for _ in range(_TURNS):
        await asyncio.sleep(0)


@pytest.fixture
def pool() -> ScriptedPool:
    return ScriptedPool()


@pytest.fixture
def queue(pool: ScriptedPool) -> QueuedPool:
    return QueuedPool(pool, NoMetrics())


async def test_a_slot_goes_to_who_is_first_when_it_is_granted(
    pool: ScriptedPool, queue: QueuedPool
) -> None:
    usual = asyncio.create_task(queue.open(ticket()))
    await turns()
    urgent_ticket = ticket("ben", priority=-1)
    urgent = asyncio.create_task(queue.open(urgent_ticket))
    await turns()
    assert urgent_ticket.ahead == 0
    pool.grant()
    await turns()
    assert urgent.done()
    assert not usual.done()
    pool.grant()
    (await usual).close()
    (await urgent).close()
    assert not pool.held
    await queue.close()


async def test_ray_is_asked_for_as_many_as_wait_within_the_window(
    pool: ScriptedPool, queue: QueuedPool
) -> None:
    waiting = [asyncio.create_task(queue.open(ticket())) for _ in range(5)]
    await turns()
    assert len(pool.asking) == AT_RAY
    waiting[4].cancel()
    waiting[3].cancel()
    waiting[2].cancel()
    await turns()
    assert len(pool.asking) == 2
    await queue.close()
    await turns()
    assert not pool.asking


async def test_models_of_one_application_share_its_line(
    pool: ScriptedPool, queue: QueuedPool
) -> None:
    asyncio.create_task(queue.open(ticket()))  # noqa: RUF006
    await turns()
    second = ticket("ann", model=ADAPTER)
    waiting = asyncio.create_task(queue.open(second))
    await turns()
    assert second.ahead == 1
    assert queue.waiting(MODEL) == queue.waiting(ADAPTER) == 2
    waiting.cancel()
    await queue.close()


async def test_a_window_that_ray_does_not_take_refuses_nobody(
    pool: ScriptedPool, queue: QueuedPool
) -> None:
    waiting = [asyncio.create_task(queue.open(ticket())) for _ in range(3)]
    await turns()
    pool.fail(ModelOverloaded())
    pool.fail(ModelOverloaded())
    await turns()
    assert not any(task.done() for task in waiting)
    for _ in waiting:
        pool.grant()
        await turns()
    assert [(await task).grant.token for task in waiting] == ["1", "2", "3"]
    await queue.close()


async def test_a_window_that_ray_does_not_take_at_all_refuses(
    pool: ScriptedPool, queue: QueuedPool
) -> None:
    waiting = asyncio.create_task(queue.open(ticket()))
    await turns()
    pool.fail(ModelOverloaded())
    with pytest.raises(ModelOverloaded) as caught:
        await waiting
    assert caught.value.retry_after_s is not None
    await queue.close()


async def test_what_the_pool_fails_with_reaches_the_one_that_waits(
    pool: ScriptedPool, queue: QueuedPool
) -> None:
    waiting = asyncio.create_task(queue.open(ticket()))
    await turns()
    pool.fail(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        await waiting
    await queue.close()


@pytest.mark.parametrize("turns_between", range(6))
async def test_a_slot_that_is_granted_in_the_moment_of_a_cancellation_is_given_back(
    pool: ScriptedPool, queue: QueuedPool, turns_between: int
) -> None:
    waiting = asyncio.create_task(queue.open(ticket()))
    await turns()
    pool.grant()
    for _ in range(turns_between):
        await asyncio.sleep(0)
    waiting.cancel()
    await turns()
    if not waiting.cancelled():
        # The grant was there first, and is the caller's now.
        (await waiting).close()
    assert not pool.held
    assert not pool.asking
    await queue.close()


async def test_a_lease_closed_twice_counts_once(pool: ScriptedPool, queue: QueuedPool) -> None:
    waiting = asyncio.create_task(queue.open(ticket()))
    await turns()
    pool.grant()
    lease = await waiting
    lease.close()
    lease.close()
    again = asyncio.create_task(queue.open(ticket()))
    await turns()
    pool.grant()
    (await again).close()
    await queue.close()


async def granted(pool: ScriptedPool, queue: QueuedPool, may_keep: int = 1) -> HeldLease:
    """Return a lease that Ray grants now."""
    waiting = asyncio.create_task(queue.open(ticket()))
    await turns()
    pool.grant(may_keep)
    return await waiting


async def test_next_request_takes_what_was_given_back_without_asking(
    pool: ScriptedPool, queue: QueuedPool
) -> None:
    lease = await granted(pool, queue)
    assert not lease.rested
    lease.give_back()
    assert pool.held == {1}
    again = await queue.open(ticket("ben"))
    assert (again.grant.token, again.rested, pool.asking) == ("1", True, [])
    again.close()
    assert not pool.held
    await queue.close()


async def test_lease_that_is_given_back_goes_to_who_is_first_at_once(
    pool: ScriptedPool, queue: QueuedPool
) -> None:
    lease = await granted(pool, queue)
    usual = asyncio.create_task(queue.open(ticket("ann")))
    await turns()
    urgent = asyncio.create_task(queue.open(ticket("ben", priority=-1)))
    await turns()
    assert len(pool.asking) == 2
    lease.give_back()
    await turns()
    assert (await urgent).grant.token == "1"
    assert not usual.done()
    # Who was served needs no call any more.
    assert len(pool.asking) == 1
    (await urgent).give_back()
    assert (await usual).grant.token == "1"
    await turns()
    assert not pool.asking
    await queue.close()


async def test_lease_that_may_not_be_kept_is_closed_when_it_is_given_back(
    pool: ScriptedPool, queue: QueuedPool
) -> None:
    lease = await granted(pool, queue, may_keep=0)
    lease.give_back()
    assert not pool.held
    await queue.close()


async def test_what_a_request_does_after_it_gave_back_changes_nothing(
    pool: ScriptedPool, queue: QueuedPool
) -> None:
    lease = await granted(pool, queue)
    lease.give_back()
    again = await queue.open(ticket())
    lease.close()
    lease.give_back()
    assert pool.held == {1}
    again.give_back()
    lease.close()
    assert pool.held == {1}
    await queue.close()
    assert not pool.held


async def fresh_and_behind(queue: QueuedPool) -> list[asyncio.Task[HeldLease]]:
    """Have one wait who wants a fresh lease, and another behind it who does not mind."""
    waiting = []
    for wanted in (ticket(fresh=True), ticket()):
        waiting.append(asyncio.create_task(queue.open(wanted)))
        await turns()
    return waiting


async def test_request_that_met_a_dead_replica_gets_a_lease_that_ray_grants_now(
    pool: ScriptedPool, queue: QueuedPool
) -> None:
    lease = await granted(pool, queue)
    # Who comes behind it does not overtake it.
    fresh, behind = await fresh_and_behind(queue)
    lease.give_back()
    await turns()
    assert not fresh.done()
    assert not behind.done()
    pool.grant(1)
    await turns()
    assert (fresh.result().grant.token, fresh.result().rested) == ("2", False)
    assert behind.result().grant.token == "1"
    assert not pool.asking
    await queue.close()


async def test_one_that_leaves_lets_the_next_have_what_is_kept(
    pool: ScriptedPool, queue: QueuedPool
) -> None:
    lease = await granted(pool, queue)
    fresh, behind = await fresh_and_behind(queue)
    lease.give_back()
    fresh.cancel()
    await turns()
    assert behind.result().grant.token == "1"
    await queue.close()


async def test_replica_that_failed_loses_what_is_kept_of_it(
    pool: ScriptedPool, queue: QueuedPool
) -> None:
    one, two = await granted(pool, queue), await granted(pool, queue)
    one.give_back()
    two.distrust()
    assert pool.held == {2}
    two.close()
    assert not pool.held
    await queue.close()


async def test_closed_queue_keeps_nothing(pool: ScriptedPool, queue: QueuedPool) -> None:
    one, two = await granted(pool, queue, 2), await granted(pool, queue, 2)
    one.give_back()
    await queue.close()
    assert pool.held == {2}
    two.give_back()
    assert not pool.held


async def test_slot_that_nobody_wants_any_more_is_kept_for_the_next(
    pool: ScriptedPool, queue: QueuedPool
) -> None:
    leaving = asyncio.create_task(queue.open(ticket()))
    await turns()
    pool.grant(1)
    leaving.cancel()
    await turns()
    if pool.held:
        assert (await queue.open(ticket())).grant.token == "1"
    await queue.close()


@pytest.mark.parametrize("turns_between", range(6))
async def test_lease_that_is_handed_over_in_the_moment_of_a_cancellation_stays_good(
    pool: ScriptedPool, queue: QueuedPool, turns_between: int
) -> None:
    lease = await granted(pool, queue)
    waiting = asyncio.create_task(queue.open(ticket()))
    await turns()
    lease.give_back()
    for _ in range(turns_between):
        await asyncio.sleep(0)
    waiting.cancel()
    await turns()
    if not waiting.cancelled():
        (await waiting).give_back()
    assert pool.held == {1}
    assert not pool.asking
    again = await queue.open(ticket())
    again.close()
    assert not pool.held
    await queue.close()


async def test_speed_counts_the_time_that_requests_held_and_not_the_rest(
    pool: ScriptedPool,
) -> None:
    now_s = 0.0
    line = Line(pool, contextvars.copy_context(), lambda: now_s, Mock())
    waiting = asyncio.create_task(line.wait(ticket()))
    await turns()
    pool.grant(1)
    lease = await waiting
    for _ in range(4):
        now_s += 0.25
        lease.give_back()
        now_s += 0.5
        lease = await line.wait(ticket())
    assert (line._rate.held, line._rate.per_s()) == (1, pytest.approx(4))
    line.close()
    lease.close()
    assert (line._rate.held, pool.held) == (0, set())


Made = TypeVar("Made")


class Walk(RuleBasedStateMachine):
    """Arrivals, grants, failures, cancellations and ends, in any order and at any moment.

    Between the rules the loop turns only where `run` is drawn, so that a grant and a
    cancellation meet at the same await.
    """

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.pool = ScriptedPool()
        self.queue: QueuedPool = self.call(lambda: QueuedPool(self.pool, NoMetrics()))
        self.waiting: list[asyncio.Task[HeldLease]] = []
        self.holding: list[HeldLease] = []
        self.settled = True

    def call(self, work: Callable[[], Made]) -> Made:
        async def inside() -> Made:
            return work()

        return self.loop.run_until_complete(inside())

    @rule(
        principal=st.sampled_from(["ann", "ben", "cem"]),
        priority=st.integers(0, 1),
        fresh=st.booleans(),
    )
    def arrive(self, principal: str, priority: int, fresh: bool) -> None:
        coming = self.queue.open(ticket(principal, priority=priority, fresh=fresh))
        self.waiting.append(self.loop.create_task(coming))
        self.settled = False

    @precondition(lambda self: self.pool.asking)
    @rule(may_keep=st.integers(0, 2))
    def grant(self, may_keep: int) -> None:
        self.pool.grant(may_keep)
        self.settled = False

    @precondition(lambda self: self.pool.asking)
    @rule(error=st.sampled_from([ModelNotReady, ZeroDivisionError]))
    def fail(self, error: type[Exception]) -> None:
        self.pool.fail(error())
        self.settled = False

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.waiting)).cancel()
        self.settled = False

    @precondition(lambda self: self.holding)
    @rule(data=st.data(), well=st.booleans())
    def end(self, data: st.DataObject, well: bool) -> None:
        lease = data.draw(st.sampled_from(self.holding))
        self.holding.remove(lease)
        self.call(lease.give_back if well else lease.close)
        self.settled = False

    @precondition(lambda self: self.holding)
    @rule(data=st.data())
    def distrust(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.holding)).distrust()

    @rule()
    def run(self) -> None:
        self.loop.run_until_complete(turns())
        self.settled = True
        for task in [task for task in self.waiting if task.done()]:
            self.waiting.remove(task)
            if not task.cancelled() and task.exception() is None:
                self.holding.append(task.result())

    @rule(turns=st.integers(1, 3))
    def run_a_little(self, turns: int) -> None:
        for _ in range(turns):
            self.loop.run_until_complete(asyncio.sleep(0))

    @invariant()
    def nothing_is_lost_or_kept(self) -> None:
        if not self.settled:
            return
        held = {int(lease.grant.token) for lease in self.holding}
        # Nobody has what another has, and the rest is kept.
        assert len(held) == len(self.holding)
        assert held <= self.pool.held
        assert len(self.pool.held - held) == sum(len(line._kept) for line in self.lines) <= 2
        assert self.queue.waiting(MODEL) == len(self.waiting) <= PLACES
        assert len(self.pool.asking) == min(AT_RAY, len(self.waiting))

    @invariant()
    def nothing_is_idle_while_the_first_may_have_it(self) -> None:
        for line in self.lines:
            first = line._queue.first()
            assert first is None or first.item.ticket.fresh or not len(line._kept)

    @property
    def lines(self) -> list[Line]:
        return list(self.queue._lines.values())

    def teardown(self) -> None:
        for task in self.waiting:
            task.cancel()
        self.run()
        assert not self.waiting
        for lease in self.holding:
            lease.close()
        assert not self.pool.asking
        self.loop.run_until_complete(self.queue.close())
        assert not self.pool.held
        self.loop.run_until_complete(turns())
        assert not asyncio.all_tasks(self.loop)
        self.loop.close()


TestWalk = Walk.TestCase
TestWalk.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
