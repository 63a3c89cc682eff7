"""The limits of an installation: the book, with its journal and PostgreSQL behind it."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

from serve_app.background import check_goes_on, stop_tasks
from serve_app.contracts import Allowance, LimitState, Reservation, Scope, Settlement
from serve_app.errors import CompAIError, HandedOver, LimitsUnavailable
from serve_app.limits.book import Change, Granted, LimitBook, PeriodTotal
from serve_app.limits.journal import Journal
from serve_app.limits.periods import utc
from serve_app.limits.usage_store import UsageStore

logger = logging.getLogger(__name__)

_KEEP_EVERY_S = 5.0
_FORGET_EVERY_S = 24 * 3600.0
# A successor waits for so long after its start, while all go on being served here.
_LOOK_FOR_SUCCESSOR_EVERY_S = 0.5
# After so long another node may have counted what this journal does not know.
_VOUCHED_FOR_S = 60.0
# Rows of one statement, so that it ends in the time that the pool gives it.
_STORED_AT_ONCE = 5000


class LimitsBroken(CompAIError):
    """The limits stopped being kept, and must be replaced."""


class LimitMetrics(Protocol):
    """Where the measurements of the limits go."""

    def budgets_held_back(self, held_back: bool) -> None:
        """Whether nothing is granted of a budget now, since what was used of it is not known."""
        ...


class NoLimitMetrics:
    """Tells nobody."""

    def budgets_held_back(self, held_back: bool) -> None:
        """See `LimitMetrics.budgets_held_back`."""


class LimitKeeping:
    """Answers nothing that would not outlive this process.

    The book decides in one step without waiting; then the journal is written, many answers in one
    commit, and only then the answer is given.

    A journal that was not in use for a minute may have missed what was counted on another node.
    It grants nothing of a budget until PostgreSQL has told what that was.

    One that starts on the same machine waits for the journal of the one before, which serves until
    then, sees that it is waited for, and hands over.
    """

    def __init__(
        self,
        journal: Journal,
        store: UsageStore,
        metrics: LimitMetrics,
        *,
        clock_s: Callable[[], float] = time.monotonic,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._journal = journal
        self._store = store
        self._metrics = metrics
        self._wall_s = wall_s
        self._changes: list[Change] = []
        self._book = LimitBook(clock_s, wall_s, note=self._changes.append)
        self._journal_id = uuid.UUID(int=0)
        # Whether what was used before, or elsewhere, was read.
        self._merged = False
        # What that adds to the journal.
        self._taken_over: list[PeriodTotal] = []
        # Whether the journal knows what was used until now.
        self._complete = False
        self._forgot_s = 0.0
        self._waiting: list[asyncio.Future[None]] = []
        self._writing: asyncio.Task[None] | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._handed_over = False

    async def start(self) -> None:
        """Read the journal, and PostgreSQL if it is there; begin to keep both up to date.

        Raises:
            ConfigError: the journal cannot be opened, or another process holds it.
        """
        await self._journal.open()
        self._journal_id, vouched_s = await self._journal.identify()
        self._complete = self._wall_s() - vouched_s <= _VOUCHED_FOR_S
        self._book.restore(*await self._journal.read())
        await self._merge()
        self._metrics.budgets_held_back(not self._complete)
        if not self._complete:
            logger.warning(
                "what was used of the budgets is not known, so they are held back until "
                "PostgreSQL is there",
                extra={"action": "limits.held_back"},
            )
        self._keeping = asyncio.create_task(self._keep_for_ever(), name="keep-limits")

    async def close(self) -> None:
        """Keep what has changed, and close."""
        if self._keeping is not None and not self._handed_over:
            await stop_tasks(self._keeping)
            await self._keep()
        await self._store.close()
        await self._journal.close()

    async def until_wanted(self) -> None:
        """Return once a successor waits. Raises OSError where that cannot be seen."""
        while not self._journal.wanted:  # noqa: ASYNC110  another process, which has no other way
            await asyncio.sleep(_LOOK_FOR_SUCCESSOR_EVERY_S)

    async def hand_over(self) -> None:
        """Answer what was asked, and let a successor go on.

        It knows all that was answered here, and tells PostgreSQL. Whoever asks from now on is
        told HandedOver. If this is cancelled, `close` does the rest.
        """
        self._handed_over = True
        await stop_tasks(self._keeping)
        with suppress(LimitsUnavailable):  # whoever waits is told the same
            await self._written()
        await self._journal.close()

    def check(self) -> None:
        """Raise LimitsBroken where the journal or the task that keeps it is dead."""
        if self._keeping is None:
            raise LimitsBroken("The limits were not started.")
        if self._handed_over:
            # Serve stops us as soon as our successor runs. If it died instead, another must start.
            raise LimitsBroken("The limits were handed over.")
        check_goes_on(self._keeping, "The limits are kept no more", LimitsBroken)
        if not self._journal.alive:
            raise LimitsBroken("The journal of the limits ended.")

    async def reserve(self, reservation: Reservation) -> Allowance:
        """See `LimitBook.reserve`.

        Raises:
            LimitsUnavailable: the journal cannot be written; or there is a budget, and what was
                used of it before is not known yet.
            HandedOver: a successor keeps the limits.
        """
        self._check_kept_here()
        if not self._complete and any(scope.has_budget for scope in reservation.scopes):
            raise LimitsUnavailable(retry_after_s=_KEEP_EVERY_S)
        allowance = self._book.reserve(reservation)
        try:
            await self._written()
        except LimitsUnavailable:
            self._undo(reservation.id)
            raise
        return allowance

    async def settle(self, settlement: Settlement) -> None:
        """See `LimitBook.settle`. Raises LimitsUnavailable, or HandedOver: tell it again."""
        self._check_kept_here()
        self._book.settle(settlement)
        await self._written()

    async def renew(self, held: Sequence[uuid.UUID]) -> list[uuid.UUID]:
        """See `LimitBook.renew`. Raises HandedOver."""
        self._check_kept_here()
        return self._book.renew(held)

    async def adopt(self, held: Sequence[Settlement]) -> None:
        """See `LimitBook.adopt`; what each of `held` has spent is what it may use at most.

        Raises LimitsUnavailable, or HandedOver: tell it again.
        """
        self._check_kept_here()
        for one in held:
            self._book.adopt(one.id, one.accounts, one.spent)
        await self._written()

    async def standing(self, scopes: Sequence[Scope]) -> list[LimitState]:
        """See `LimitBook.standing`. Raises HandedOver."""
        self._check_kept_here()
        return self._book.standing(scopes)

    def _check_kept_here(self) -> None:
        if self._handed_over:
            raise HandedOver

    async def _written(self) -> None:
        """Return once every change of the book until now is in the journal.

        Raises:
            LimitsUnavailable: they are not; they will be written with the next ones.
        """
        if not self._changes and not self._writing:
            return
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(written)
        if not self._writing:
            self._writing = asyncio.create_task(self._write(), name="write-limits")
        await written

    async def _write(self) -> None:
        """Write what has changed, and all that changes meanwhile as one, until nobody waits."""
        try:
            while self._waiting:
                changes, waiting = self._changes.copy(), self._waiting
                self._changes.clear()
                self._waiting = []
                await self._write_group(changes, waiting)
        finally:
            self._writing = None

    async def _write_group(
        self, changes: list[Change], waiting: list[asyncio.Future[None]]
    ) -> None:
        try:
            await self._journal.write(changes)
        except LimitsUnavailable:
            self._changes[:0] = changes
            for written in waiting:
                if not written.done():
                    written.set_exception(LimitsUnavailable())
            return
        for written in waiting:
            if not written.done():  # its caller is gone
                written.set_result(None)

    def _undo(self, reservation_id: uuid.UUID) -> None:
        """Let go of a reservation whose grant could not be written."""
        self._book.undo(reservation_id)
        self._changes[:] = [
            change
            for change in self._changes
            if not (isinstance(change, Granted) and change.id == reservation_id)
        ]

    async def _keep_for_ever(self) -> None:
        while True:
            await asyncio.sleep(_KEEP_EVERY_S)
            await self._keep()

    async def _keep(self) -> None:
        self._book.sweep()
        try:
            await self._written()
            await self._journal.fold(self._wall_s())
            if self._complete:
                await self._journal.vouch(self._wall_s())
        except LimitsUnavailable:
            logger.warning("the journal of the limits cannot be written")
        await self._merge()
        await self._store_totals()
        self._metrics.budgets_held_back(not self._complete)

    async def _merge(self) -> None:
        """Take over what others have used, once: a journal of another node, or of before."""
        if self._merged:
            return
        try:
            totals = await self._store.others(self._journal_id, utc(self._wall_s()))
            self._taken_over += self._book.merge(totals)
            await self._journal.add(self._taken_over)
        except LimitsUnavailable:
            return
        self._merged = self._complete = True

    async def _store_totals(self) -> None:
        if not self._merged:
            return
        totals = self._book.take_changed()
        try:
            for start in range(0, len(totals), _STORED_AT_ONCE):
                await self._store.keep(self._journal_id, totals[start : start + _STORED_AT_ONCE])
            if time.monotonic() >= self._forgot_s:
                await self._store.forget(utc(self._wall_s()))
                self._forgot_s = time.monotonic() + _FORGET_EVERY_S
        except LimitsUnavailable:
            self._book.put_back(totals)
