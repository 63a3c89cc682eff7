"""The queue in front of a pool that does as it is told: nothing is lost, kept or given twice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve_app.config import ModelEntry, QueueConfig, Standing
from serve_app.contracts import Lease, LeaseGrant, LeaseHint, ModelState
from serve_app.errors import ModelNotReady, ModelOverloaded
from serve_app.metrics import NoMetrics
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

    def __init__(self, number: int, held: set[int]) -> None:
        self._number = number
        self._held = held
        self.grant = LeaseGrant(address="a", token=str(number), replica_id="r")
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

    def grant(self) -> int:
        """Grant the oldest call; return the number of the lease."""
        self.granted += 1
        self.asking.pop(0).set_result(ScriptedLease(self.granted, self.held))
        return self.granted

    def fail(self, error: Exception) -> None:
        """Fail the oldest call."""
        self.asking.pop(0).set_exception(error)


def ticket(principal_id: str = "ann", *, priority: int = 0, model: ModelEntry = MODEL) -> Ticket:
    standing = Standing(priority=priority)
    return Ticket(
        model=model,
        hint=LeaseHint(request_id="r", principal_id=principal_id, standing=standing),
        queue=QueueConfig(max_waiting=PLACES, at_ray=AT_RAY),
        timeout_s=3600,
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
    pool.held = _Forgiving()
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


class _Forgiving(set[int]):
    def remove(self, element: int) -> None:
        self.discard(element)


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
        self.waiting: list[asyncio.Task[Lease]] = []
        self.holding: list[Lease] = []
        self.settled = True

    def call(self, work: Callable[[], QueuedPool]) -> QueuedPool:
        async def inside() -> QueuedPool:
            return work()

        return self.loop.run_until_complete(inside())

    @rule(principal=st.sampled_from(["ann", "ben", "cem"]), priority=st.integers(0, 1))
    def arrive(self, principal: str, priority: int) -> None:
        coming = self.queue.open(ticket(principal, priority=priority))
        self.waiting.append(self.loop.create_task(coming))
        self.settled = False

    @precondition(lambda self: self.pool.asking)
    @rule()
    def grant(self) -> None:
        self.pool.grant()
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
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.holding))
        self.holding.remove(lease)
        lease.close()

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
        assert self.pool.held == held
        assert self.queue.waiting(MODEL) == len(self.waiting) <= PLACES
        assert len(self.pool.asking) == min(AT_RAY, len(self.waiting))

    def teardown(self) -> None:
        for task in self.waiting:
            task.cancel()
        self.run()
        assert not self.waiting
        for lease in self.holding:
            lease.close()
        assert not self.pool.held
        assert not self.pool.asking
        self.loop.run_until_complete(self.queue.close())
        self.loop.run_until_complete(turns())
        assert not asyncio.all_tasks(self.loop)
        self.loop.close()


TestWalk = Walk.TestCase
TestWalk.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
