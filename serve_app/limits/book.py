"""The counters behind the limits. Pure: no I/O, the clock is handed in.

Requests a minute are a sliding-window log, which is exact: at any moment no more than the
limit were granted in the 60 s before. It holds one time stamp a granted request, so at most
the limit for each principal.
"""

from __future__ import annotations

import math
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from serve_app.contracts import ReservationRequest
from serve_app.errors import RateLimited

WINDOW_S = 60.0
_BUSY_RETRY_S = 1.0
# A settle can overtake its reserve on the way here; the id is remembered for this long.
_TOMBSTONE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a reservation was not granted."""

    limit: str
    allowed: int
    retry_after_s: float

    def error(self) -> RateLimited:
        """Return the error that the client gets."""
        return RateLimited(
            f"The limit of {self.allowed} {self.limit} is reached. "
            f"Try again in {math.ceil(self.retry_after_s)} s.",
            retry_after_s=self.retry_after_s,
        )


@dataclass(slots=True)
class _Account:
    granted_s: deque[float] = field(default_factory=deque)
    held: set[uuid.UUID] = field(default_factory=set)


class LimitBook:
    """Reservations of all principals."""

    def __init__(self, clock_s: Callable[[], float], *, renewal_timeout_s: float = 15.0) -> None:
        self._clock_s = clock_s
        self._renewal_timeout_s = renewal_timeout_s
        self._accounts: dict[str, _Account] = {}
        # id → principal, and when it was last said to be held; the longest ago comes first.
        self._owner: OrderedDict[uuid.UUID, tuple[str, float]] = OrderedDict()
        self._settled_s: OrderedDict[uuid.UUID, float] = OrderedDict()

    def reserve(self, request: ReservationRequest) -> Refusal | None:
        """Grant a reservation (None) or say why not. A repeated id is granted once."""
        now = self._clock_s()
        self._expire(now)
        if request.id in self._owner or request.id in self._settled_s:
            return None
        account = self._accounts.setdefault(request.principal_id, _Account())
        if (refusal := _refusal(account, request, now)) is not None:
            return refusal
        account.granted_s.append(now)
        self._hold(request.id, request.principal_id, now)
        return None

    def settle(self, reservation_id: uuid.UUID) -> None:
        """Give back what ends with the request; the window keeps its time stamp."""
        self._settled_s[reservation_id] = self._clock_s()
        self._release(reservation_id)

    def renew(self, held: Iterable[tuple[uuid.UUID, str]]) -> None:
        """Note that what a gateway lists (id, principal) is held, known here before or not.

        A reservation that nobody lists for `renewal_timeout_s` ends: its gateway was killed, or
        its settle was lost. After a restart of this book the lists fill it again.
        """
        now = self._clock_s()
        for reservation_id, principal_id in held:
            if reservation_id not in self._settled_s:
                self._hold(reservation_id, principal_id, now)

    def held(self, principal_id: str) -> int:
        """Return how many reservations `principal_id` holds now."""
        account = self._accounts.get(principal_id)
        return len(account.held) if account else 0

    def _hold(self, reservation_id: uuid.UUID, principal_id: str, now: float) -> None:
        self._owner[reservation_id] = (principal_id, now)
        self._owner.move_to_end(reservation_id)
        self._accounts.setdefault(principal_id, _Account()).held.add(reservation_id)

    def _release(self, reservation_id: uuid.UUID) -> None:
        principal_id, _ = self._owner.pop(reservation_id, ("", 0.0))
        if (account := self._accounts.get(principal_id)) is not None:
            account.held.discard(reservation_id)

    def _expire(self, now: float) -> None:
        while self._settled_s:
            oldest_id, settled_s = next(iter(self._settled_s.items()))
            if now - settled_s < _TOMBSTONE_S:
                break
            del self._settled_s[oldest_id]
        while self._owner:
            longest_id, (_, said_s) = next(iter(self._owner.items()))
            if now - said_s <= self._renewal_timeout_s:
                break
            self._release(longest_id)

    def sweep(self) -> None:
        """Drop what has expired and the accounts of principals that are idle."""
        now = self._clock_s()
        self._expire(now)
        for principal_id, account in list(self._accounts.items()):
            _trim(account, now)
            if not account.granted_s and not account.held:
                del self._accounts[principal_id]


def _refusal(account: _Account, request: ReservationRequest, now: float) -> Refusal | None:
    policy = request.policy
    if policy.concurrency is not None and len(account.held) >= policy.concurrency:
        return Refusal(
            limit="concurrent requests", allowed=policy.concurrency, retry_after_s=_BUSY_RETRY_S
        )
    _trim(account, now)
    allowed = policy.requests_per_minute
    if allowed is not None and len(account.granted_s) >= allowed:
        # A place is free when the grant that fills the last place leaves the window.
        leaves_s = account.granted_s[len(account.granted_s) - allowed] + WINDOW_S
        return Refusal(
            limit="requests per minute", allowed=allowed, retry_after_s=max(0.0, leaves_s - now)
        )
    return None


def _trim(account: _Account, now: float) -> None:
    while account.granted_s and now - account.granted_s[0] >= WINDOW_S:
        account.granted_s.popleft()
