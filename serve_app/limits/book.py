"""The counters behind the limits. Pure: no I/O, the clock is handed in.

Requests a minute are a sliding-window log, which is exact: at any moment no more than the
limit were granted in the 60 s before. It holds one time stamp a granted request, so at most
the limit for each principal.
"""

from __future__ import annotations

import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from serve_app.contracts import Allowance, Refusal, ReservationRequest, Window

WINDOW_S = 60.0
# Where nothing is known yet of how long the requests of a principal take.
_BUSY_RETRY_S = 1.0
# Of the latest request in the mean duration.
_LATEST_SHARE = 0.2
# A settle can overtake its reserve on the way here; the id is remembered for this long.
_TOMBSTONE_S = 60.0


@dataclass(slots=True)
class _Account:
    granted_s: deque[float] = field(default_factory=deque)
    # id → when it began; the oldest comes first.
    held: dict[uuid.UUID, float] = field(default_factory=dict)
    # How long its requests take, the latest counting most; None before the first has ended.
    duration_s: float | None = None

    def ended(self, reservation_id: uuid.UUID, now: float) -> None:
        """Note that a request is over, where it is one of those held."""
        if (begun_s := self.held.get(reservation_id)) is None:
            return
        took_s = now - begun_s
        known_s = took_s if self.duration_s is None else self.duration_s
        self.duration_s = known_s + _LATEST_SHARE * (took_s - known_s)


class LimitBook:
    """Reservations of all principals."""

    def __init__(self, clock_s: Callable[[], float], *, renewal_timeout_s: float = 15.0) -> None:
        self._clock_s = clock_s
        self._renewal_timeout_s = renewal_timeout_s
        self._accounts: dict[str, _Account] = {}
        # id → principal, and when it was last said to be held; the longest ago comes first.
        self._owner: OrderedDict[uuid.UUID, tuple[str, float]] = OrderedDict()
        self._settled_s: OrderedDict[uuid.UUID, float] = OrderedDict()

    def reserve(self, request: ReservationRequest) -> Allowance:
        """Grant a reservation or say why not. A repeated id is granted once."""
        now = self._clock_s()
        self._expire(now)
        account = self._accounts.setdefault(request.principal_id, _Account())
        _trim(account, now)
        refusal = None
        if request.id not in self._owner and request.id not in self._settled_s:
            refusal = _refusal(account, request, now)
            if refusal is None:
                account.granted_s.append(now)
                self._hold(request.id, request.principal_id, now)
        return Allowance(refusal=refusal, requests=_requests(account, request, now))

    def settle(self, reservation_id: uuid.UUID) -> None:
        """Give back what ends with the request; the window keeps its time stamp."""
        now = self._clock_s()
        self._settled_s[reservation_id] = now
        if (owner := self._owner.get(reservation_id)) is not None:
            self._accounts[owner[0]].ended(reservation_id, now)
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
        self._accounts.setdefault(principal_id, _Account()).held.setdefault(reservation_id, now)

    def _release(self, reservation_id: uuid.UUID) -> None:
        principal_id, _ = self._owner.pop(reservation_id, ("", 0.0))
        if (account := self._accounts.get(principal_id)) is not None:
            account.held.pop(reservation_id, None)

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
            limit="concurrent requests",
            allowed=policy.concurrency,
            retry_after_s=_until_one_ends(account, now),
        )
    allowed = policy.requests_per_minute
    if allowed is not None and len(account.granted_s) >= allowed:
        # A place is free when the grant that fills the last place leaves the window.
        leaves_s = account.granted_s[len(account.granted_s) - allowed] + WINDOW_S
        return Refusal(
            limit="requests per minute", allowed=allowed, retry_after_s=max(0.0, leaves_s - now)
        )
    return None


def _until_one_ends(account: _Account, now: float) -> float:
    """Return when the oldest request should be over, as its principal's requests go."""
    if account.duration_s is None:
        return _BUSY_RETRY_S
    left_s = account.duration_s - (now - next(iter(account.held.values())))
    # It takes longer than most. Of many, one ends about this often.
    return left_s if left_s > 0 else account.duration_s / len(account.held)


def _requests(account: _Account, request: ReservationRequest, now: float) -> Window | None:
    allowed = request.policy.requests_per_minute
    if allowed is None:
        return None
    granted = account.granted_s
    return Window(
        limit=allowed,
        remaining=max(0, allowed - len(granted)),
        reset_s=granted[-1] + WINDOW_S - now if granted else 0.0,
    )


def _trim(account: _Account, now: float) -> None:
    while account.granted_s and now - account.granted_s[0] >= WINDOW_S:
        account.granted_s.popleft()
