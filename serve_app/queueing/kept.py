"""Leases between two requests: kept for a moment, so that the next one need not ask Ray."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from serve_app.contracts import Lease

# So long a lease may lie idle.
IDLE_S = 1.0
# And so old it may be: a replica that is to stop becomes free, and Ray's balancing and its
# autoscaler see the truth, no later than this after the requests that run.
OLDEST_S = 5.0

Clock = Callable[[], float]


class Later(Protocol):
    """Calls something later: the event loop's `call_later`, or a test's."""

    def __call__(self, delay_s: float, callback: Callable[[], None], /) -> asyncio.TimerHandle:
        """Call `callback` after `delay_s`, once."""
        ...


@dataclass(eq=False, slots=True)
class OpenLease:
    """A lease that Ray granted, whoever has it now."""

    lease: Lease
    opened_at_s: float
    # Since then nobody has seen whether its replica is still there.
    rested: bool = False
    until_s: float = 0.0

    @property
    def replica_id(self) -> str:
        """The replica that it is a slot of."""
        return self.lease.grant.replica_id


class KeptLeases:
    """The idle leases of one application in this gateway; the last that came is the first to go.

    They are closed when their time is over, with one timer for all.
    """

    def __init__(self, clock_s: Clock, later: Later) -> None:
        self._clock_s = clock_s
        self._later = later
        self._idle: list[OpenLease] = []
        self._of_replica: Counter[str] = Counter()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._idle)

    def keep(self, opened: OpenLease) -> None:
        """Keep it for the next request; close it where it is too old, or enough are kept."""
        now_s = self._clock_s()
        opened.until_s = min(now_s + IDLE_S, opened.opened_at_s + OLDEST_S)
        most = opened.lease.grant.may_keep
        if opened.until_s <= now_s or self._of_replica[opened.replica_id] >= most:
            opened.lease.close()
            return
        opened.rested = True
        self._idle.append(opened)
        self._of_replica[opened.replica_id] += 1
        # One that is set goes off within `IDLE_S`; until then what is overdue is not handed out.
        if self._timer is None:
            self._timer = self._later(opened.until_s - now_s, self._close_overdue)

    def take(self) -> OpenLease | None:
        """Return the last that was kept and whose time is not over."""
        while self._idle:
            opened = self._idle.pop()
            self._of_replica[opened.replica_id] -= 1
            if opened.until_s > self._clock_s():
                return opened
            opened.lease.close()
        return None

    def close_of(self, replica_id: str) -> None:
        """Close those of one replica."""
        self._close_where(lambda opened: opened.replica_id == replica_id)

    def close(self) -> None:
        """Close all."""
        self._close_where(lambda _: True)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close_overdue(self) -> None:
        self._timer = None
        now_s = self._clock_s()
        self._close_where(lambda opened: opened.until_s <= now_s)
        if self._idle:
            next_s = min(opened.until_s for opened in self._idle)
            self._timer = self._later(next_s - now_s, self._close_overdue)

    def _close_where(self, ends: Callable[[OpenLease], bool]) -> None:
        ended = [opened for opened in self._idle if ends(opened)]
        self._idle = [opened for opened in self._idle if not ends(opened)]
        self._of_replica = Counter(opened.replica_id for opened in self._idle)
        for opened in ended:
            opened.lease.close()
