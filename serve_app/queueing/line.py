"""Those who wait for the replicas of one application, and the calls that ask Ray for slots.

A call asks for a slot for nobody in particular: whoever is first when a slot is granted gets
it. So the order is the queue's, however long Ray takes, and who leaves takes nothing along.

A lease whose request ended in good order goes to who is first then, or is kept for a moment for
who comes next (`kept`). While somebody waits who may have it, none is idle.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from serve_app.config import ModelEntry, WhenCold
from serve_app.contracts import Lease, LeaseGrant, ModelPool, ModelState
from serve_app.errors import ModelNotReady, ModelOverloaded
from serve_app.queueing.fair_queue import Entry, FairQueue, QueueFull
from serve_app.queueing.kept import Clock, KeptLeases, Later, OpenLease
from serve_app.queueing.service_rate import ServiceRate, retry_after_s
from serve_app.queueing.ticket import Ticket

# A warm model grants in milliseconds. What takes longer is looked into, then once a second.
_FIRST_LOOK_S = 0.25
_LOOK_EVERY_S = 1.0
# While a start takes longer than the last one did, this part of it is what we say is left.
_OVERDUE_PART = 0.1


@dataclass(eq=False, slots=True)
class _Waiter:
    ticket: Ticket
    granted: asyncio.Future[HeldLease] = field(default_factory=asyncio.Future)


class HeldLease:
    """A lease in the hands of one request, which ends it: what it does later changes nothing."""

    def __init__(self, line: Line, opened: OpenLease, began_s: float) -> None:
        self._line = line
        self._opened = opened
        self._began_s = began_s
        self._ended = False
        # Whether it was idle before, so that its replica may be gone.
        self.rested = opened.rested

    @property
    def grant(self) -> LeaseGrant:
        """Where and with what to ask."""
        return self._opened.lease.grant

    def close(self) -> None:
        """See `Lease.close`."""
        if not self._ended:
            self._ended = True
            self._opened.lease.close()
            self._line.ended(self._began_s)

    def give_back(self) -> None:
        """Leave it to the next request. Only where nothing runs under it any more. Never waits."""
        if not self._ended:
            self._ended = True
            self._line.ended(self._began_s)
            self._line.keep(self._opened)

    def distrust(self) -> None:
        """Close what else is kept of its replica, which failed."""
        self._line.distrust(self._opened.replica_id)


class Line:
    """The queue of one application in this gateway."""

    def __init__(
        self,
        pool: ModelPool,
        context: contextvars.Context,
        clock_s: Clock = time.monotonic,
        later: Later | None = None,
    ) -> None:
        self._pool = pool
        self._context = context
        self._clock_s = clock_s
        self._queue: FairQueue[_Waiter] = FairQueue()
        self._rate = ServiceRate(clock_s)
        self._kept = KeptLeases(clock_s, later or self._call_later)
        # Calls that wait for a slot, and when each began.
        self._calls: dict[asyncio.Task[Lease], float] = {}
        self._watching: asyncio.Task[None] | None = None
        self._closed = False
        self._granted_at_s = float("-inf")
        # Why nothing can be served, and until when that is believed without another look.
        self._state = ModelState.UNKNOWN
        self._state_until_s = float("-inf")
        self._starting_since_s: float | None = None
        self._start_s: float | None = None
        # A call is kept until then though nobody waits, so that the model starts.
        self._wake_until_s = float("-inf")

    def __len__(self) -> int:
        """How many wait."""
        return len(self._queue)

    async def wait(self, ticket: Ticket) -> HeldLease:
        """See `QueuedPool.open`."""
        entry = self._enter(ticket)
        try:
            await self._until_granted(entry)
            return entry.item.granted.result()
        except BaseException:
            self._leave(entry)
            raise

    def close(self) -> None:
        """Stop asking. Those who wait still run into their deadlines."""
        self._closed = True
        self._kept.close()
        for call in list(self._calls):
            call.cancel()
        if self._watching is not None:
            self._watching.cancel()

    # What becomes of a lease.

    def ended(self, began_s: float) -> None:
        """Note that a request that began to hold a lease at `began_s` holds it no more."""
        self._rate.closed(began_s)

    def keep(self, opened: OpenLease) -> None:
        """Hand a lease that nobody holds to who is first, or keep it for who comes next."""
        if self._closed:
            opened.lease.close()
            return
        self._kept.keep(opened)
        self._even_out()

    def distrust(self, replica_id: str) -> None:
        """Close what is kept of a replica that failed."""
        self._kept.close_of(replica_id)

    def _call_later(self, delay_s: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        loop = asyncio.get_running_loop()
        return loop.call_later(delay_s, callback, context=self._context.copy())

    def _even_out(self) -> None:
        """Hand what is kept to those who are first, and drop the calls that nobody needs then."""
        while (first := self._queue.first()) is not None and not first.item.ticket.fresh:
            opened = self._kept.take()
            if opened is None:
                break
            self._hand_to_first(opened)
        self._drop_calls()

    def _hand_to_first(self, opened: OpenLease) -> bool:
        entry = self._queue.pop()
        if entry is not None:
            entry.item.granted.set_result(HeldLease(self, opened, self._rate.opened()))
        return entry is not None

    # Those who wait.

    def _enter(self, ticket: Ticket) -> Entry[_Waiter]:
        hint = ticket.hint
        ticket.ahead = self._queue.ahead_of(hint.principal_id, hint.standing)
        self._refuse_if_useless(ticket)
        places = ticket.queue.max_waiting
        try:
            entry = self._queue.push(_Waiter(ticket), hint.principal_id, hint.standing, places)
        except QueueFull:
            raise self._overloaded(ticket) from None
        if entry.displaced is not None:
            displaced = entry.displaced.item
            displaced.granted.set_exception(self._overloaded(displaced.ticket))
        self._even_out()
        self._ask(ticket)
        return entry

    async def _until_granted(self, entry: Entry[_Waiter]) -> None:
        granted, ticket = entry.item.granted, entry.item.ticket
        if granted.done():
            return
        waited_s = ticket.timeout_s
        await asyncio.wait([granted], timeout=waited_s)
        if not granted.done() and self._starting_since_s is not None:
            longer_s = max(0.0, ticket.model.cold_timeout_s - waited_s)
            await asyncio.wait([granted], timeout=longer_s)
            waited_s += longer_s
        if not granted.done():
            self._queue.remove(entry)
            granted.set_exception(self._too_late(ticket, waited_s))

    def _leave(self, entry: Entry[_Waiter]) -> None:
        granted = entry.item.granted
        if not self._queue.remove(entry) and granted.exception() is None:
            # It was granted in the moment in which its request was cancelled.
            granted.result().give_back()
        self._even_out()

    def _fail_all(self, error: Callable[[Ticket], Exception], only: WhenCold | None) -> None:
        for entry in list(self._queue):
            ticket = entry.item.ticket
            if only is None or ticket.model.when_cold is only:
                self._queue.remove(entry)
                entry.item.granted.set_exception(error(ticket))
        self._even_out()

    # The calls at Ray.

    def _ask(self, ticket: Ticket) -> None:
        """Ask for as many slots as requests wait, within the window."""
        while not self._closed and len(self._calls) < min(ticket.queue.at_ray, len(self._queue)):
            call = asyncio.create_task(
                self._open(ticket), name="open-lease", context=self._context.copy()
            )
            self._calls[call] = self._clock_s()
            call.add_done_callback(self._answered)
        if self._calls and self._watching is None:
            self._watching = asyncio.create_task(
                self._watch(ticket.model), name="watch-model", context=self._context.copy()
            )

    async def _open(self, ticket: Ticket) -> Lease:
        return await self._pool.open(ticket.model, ticket.hint)

    def _answered(self, call: asyncio.Task[Lease]) -> None:
        # None of a call that was cancelled: it may have been granted all the same.
        since_s = self._calls.pop(call, None)
        error = None if call.cancelled() else call.exception()
        if not call.cancelled() and error is None:
            self._hand_out(call.result())
        elif isinstance(error, ModelOverloaded) and self._calls:
            # Ray takes fewer than the window at once: we ask again when one is granted.
            return
        elif error is not None and since_s is not None:
            self._pass_on(error)
        # A call that was dropped may have served somebody, for whom another was made.
        self._even_out()
        if (first := self._queue.first()) is not None:
            self._ask(first.item.ticket)

    def _hand_out(self, lease: Lease) -> None:
        self._note_grant()
        opened = OpenLease(lease, self._granted_at_s)
        if not self._hand_to_first(opened):
            self.keep(opened)

    def _pass_on(self, error: BaseException) -> None:
        entry = self._queue.pop()
        if entry is None:
            return
        if isinstance(error, ModelOverloaded):
            error = self._overloaded(entry.item.ticket)
        elif isinstance(error, ModelNotReady) and error.retry_after_s is None:
            error.retry_after_s = self._usual_start_s(entry.item.ticket)
        entry.item.granted.set_exception(error)

    def _drop_calls(self) -> None:
        """Cancel the calls that nobody needs any more, the youngest first."""
        waking = 1 if self._clock_s() < self._wake_until_s else 0
        for call in list(self._calls)[max(len(self._queue), waking) :]:
            del self._calls[call]
            call.cancel()

    # What is wrong with the model, when nothing is granted.

    async def _watch(self, model: ModelEntry) -> None:
        pause_s = _FIRST_LOOK_S
        try:
            while True:
                begun_s = self._clock_s()
                await asyncio.sleep(pause_s)
                self._drop_calls()
                if not self._calls:
                    return
                # What holds leases or gets them serves; to ask for each wait would be a load.
                if not self._rate.held and self._granted_at_s < begun_s:
                    self._note_state(await self._pool.state(model))
                    pause_s = _LOOK_EVERY_S
        finally:
            self._watching = None

    def _note_grant(self) -> None:
        self._granted_at_s = self._clock_s()
        self._state = ModelState.SERVING
        self._note_started()

    def _note_started(self) -> None:
        if self._starting_since_s is not None:
            self._start_s = self._clock_s() - self._starting_since_s
            self._starting_since_s = None

    def _note_state(self, state: ModelState) -> None:
        self._state = state
        self._state_until_s = self._clock_s() + 2 * _LOOK_EVERY_S
        if state.cold:
            if self._starting_since_s is None:
                self._starting_since_s = min(self._calls.values(), default=self._clock_s())
            self._fail_all(self._refused_cold, WhenCold.REFUSE)
        elif state in (ModelState.FAILED, ModelState.ABSENT):
            self._starting_since_s = None
            self._wake_until_s = float("-inf")
            self._fail_all(self._broken, None)
        elif state is ModelState.SERVING:
            self._note_started()

    def _refuse_if_useless(self, ticket: Ticket) -> None:
        if self._clock_s() > self._state_until_s:
            return
        if self._state in (ModelState.FAILED, ModelState.ABSENT):
            raise self._broken(ticket)
        if self._state.cold and ticket.model.when_cold is WhenCold.REFUSE and self._calls:
            raise self._refused_cold(ticket)

    # What those who are refused are told.

    def _overloaded(self, ticket: Ticket) -> ModelOverloaded:
        return ModelOverloaded(
            f"{len(self._queue)} requests wait for `{ticket.model.name}`, which is as many as "
            "may. Try again later.",
            retry_after_s=self._until_served_s(ticket),
        )

    def _too_late(self, ticket: Ticket, waited_s: float) -> ModelNotReady:
        return ModelNotReady(
            f"No replica of `{ticket.model.name}` had room within {waited_s:g} s. Try again later.",
            retry_after_s=self._until_started_s(ticket)
            if self._starting_since_s is not None
            else self._until_served_s(ticket),
        )

    def _refused_cold(self, ticket: Ticket) -> ModelNotReady:
        self._wake_until_s = self._clock_s() + ticket.model.cold_timeout_s
        return ModelNotReady(
            f"`{ticket.model.name}` is being started. Try again later.",
            retry_after_s=self._until_started_s(ticket),
        )

    def _broken(self, ticket: Ticket) -> ModelNotReady:
        name = ticket.model.name
        if self._state is ModelState.ABSENT:
            return ModelNotReady(
                f"`{name}` is not deployed now.", retry_after_s=self._usual_start_s(ticket)
            )
        return ModelNotReady(
            f"`{name}` failed and does not run now.", retry_after_s=self._usual_start_s(ticket)
        )

    def _until_served_s(self, ticket: Ticket) -> float:
        hint = ticket.hint
        ahead = self._queue.ahead_of(hint.principal_id, hint.standing)
        return retry_after_s(ahead, self._rate.per_s(), ticket.timeout_s)

    def _until_started_s(self, ticket: Ticket) -> float:
        usual_s = self._usual_start_s(ticket)
        since_s = self._starting_since_s
        gone_s = 0.0 if since_s is None else self._clock_s() - since_s
        return max(usual_s - gone_s, usual_s * _OVERDUE_PART)

    def _usual_start_s(self, ticket: Ticket) -> float:
        return ticket.model.start_guess_s if self._start_s is None else self._start_s
