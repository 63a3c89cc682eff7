"""The counters behind the limits. Pure: no I/O, the clocks are handed in.

What a request may use at most is reserved in every scope that it belongs to, and settled with
what it did use. At every moment, of every limit: what is reserved and what was used is no more
than the limit, so nothing goes over it whenever the requests under way end.
"""

from __future__ import annotations

import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from serve_app.contracts import (
    Allowance,
    Limit,
    LimitState,
    Reason,
    Refusal,
    Reservation,
    Scope,
    Settlement,
    Spent,
    Window,
)
from serve_app.limits.account import NOTHING, Account, Desk, Totals
from serve_app.limits.periods import Today
from serve_app.limits.window import WINDOW_S

# A settle can overtake its reserve on the way here; the id is remembered for this long.
TOMBSTONE_S = 60.0
# For how long a request may still tell what it did use, after its gateway was given up.
LATE_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Granted:
    """A reservation began to be held. `at_s` is in seconds since 1970."""

    id: uuid.UUID
    accounts: tuple[str, ...]
    most: Spent
    at_s: float
    # Whether it took a place in the windows of requests.
    counted: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A reservation is held no more; `expired` is one whose gateway was given up."""

    id: uuid.UUID
    accounts: tuple[str, ...]
    spent: Spent
    at_s: float
    expired: bool = False


Change = Granted | Ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """What is known of a reservation of before this book was made."""

    granted: Granted | None
    ended: Ended | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PeriodTotal:
    """What an account used in a period, in all."""

    account: str
    period: str
    spent: Spent


@dataclass(slots=True)
class _Held:
    accounts: tuple[str, ...]
    most: Spent
    # When its gateway last said that it is under way.
    said_s: float


@dataclass(frozen=True, slots=True)
class _Expired:
    accounts: tuple[str, ...]
    spent: Spent
    at_s: float


def _unnoted(change: Change) -> None:
    """Take no note."""


class LimitBook:
    """Reservations and usage of all scopes.

    Args:
        clock_s: monotonic seconds, for the windows.
        wall_s: seconds since 1970, for days and months.
        note: told of every change as it is made.
    """

    def __init__(
        self,
        clock_s: Callable[[], float],
        wall_s: Callable[[], float],
        *,
        note: Callable[[Change], None] = _unnoted,
        renewal_timeout_s: float = 15.0,
    ) -> None:
        self._clock_s = clock_s
        self._wall_s = wall_s
        self._note = note
        self._renewal_timeout_s = renewal_timeout_s
        self._accounts: dict[str, Account] = {}
        self._totals: dict[str, Totals] = {}
        # What was told longest ago comes first, in each of these.
        self._held: OrderedDict[uuid.UUID, _Held] = OrderedDict()
        self._settled_s: OrderedDict[uuid.UUID, float] = OrderedDict()
        self._expired: OrderedDict[uuid.UUID, _Expired] = OrderedDict()
        # Accounts whose totals have changed since they were last taken.
        self._changed: set[str] = set()

    def reserve(self, reservation: Reservation) -> Allowance:
        """Grant a reservation or say why not. A repeated id is granted once."""
        now = self._clock_s()
        self._expire(now)
        desks = self._desks(reservation.scopes, now)
        refusal = None
        if reservation.id not in self._held and reservation.id not in self._settled_s:
            refusal = _strictest(desks, reservation.most)
            if refusal is None:
                self._grant(reservation, now)
        return Allowance(
            refusal=refusal,
            requests=_tightest(desks, Limit.REQUESTS_PER_MINUTE),
            tokens=_tightest(desks, Limit.TOKENS_PER_MINUTE),
        )

    def settle(self, settlement: Settlement) -> None:
        """Count what a request did use in the place of what it had reserved; once."""
        now = self._clock_s()
        if settlement.id in self._settled_s:
            return
        if (expired := self._expired.pop(settlement.id, None)) is not None:
            self._take_back(expired, now)
        self._release(settlement.id, now)
        self._settled_s[settlement.id] = now
        self._spend(settlement.accounts, settlement.spent, now)
        self._note_end(settlement.id, settlement.accounts, settlement.spent)

    def undo(self, reservation_id: uuid.UUID) -> None:
        """Let go of a reservation as if it had not been granted; its place in a minute is used."""
        self._release(reservation_id, self._clock_s())

    def renew(self, held: Iterable[uuid.UUID]) -> list[uuid.UUID]:
        """Note that what a gateway lists is under way; return what is not known to be.

        A reservation that nobody lists for `renewal_timeout_s` is counted as if all of it was
        used: its gateway was killed, and what the engine did until then is not known.
        """
        now = self._clock_s()
        unknown = []
        for reservation_id in held:
            if reservation_id in self._held:
                self._held[reservation_id].said_s = now
                self._held.move_to_end(reservation_id)
            elif reservation_id not in self._settled_s:
                unknown.append(reservation_id)
        return unknown

    def adopt(self, reservation_id: uuid.UUID, accounts: tuple[str, ...], most: Spent) -> None:
        """Hold what another book has granted, or what was given up here too early."""
        now = self._clock_s()
        if reservation_id in self._held or reservation_id in self._settled_s:
            return
        if (expired := self._expired.pop(reservation_id, None)) is not None:
            self._take_back(expired, now)
        self._hold(reservation_id, accounts, most, now)
        granted = Granted(
            id=reservation_id, accounts=accounts, most=most, at_s=self._wall_s(), counted=False
        )
        self._note(granted)

    def standing(self, scopes: Sequence[Scope]) -> list[LimitState]:
        """Return every limit of `scopes` as it stands; takes nothing."""
        now = self._clock_s()
        self._expire(now)
        return [state for desk in self._desks(scopes, now) for state in desk.states()]

    def held(self, account: str) -> int:
        """Return how many reservations `account` holds now."""
        return len(self._accounts[account].held) if account in self._accounts else 0

    def sweep(self) -> None:
        """Drop what has expired and the accounts that are idle."""
        now = self._clock_s()
        self._expire(now)
        for key, account in list(self._accounts.items()):
            account.trim(now)
            if account.idle:
                del self._accounts[key]
        month = Today.at(self._wall_s()).month
        for key, totals in list(self._totals.items()):
            if totals.month.period < month and key not in self._changed:
                del self._totals[key]

    # What was before, and what is to be kept.

    def restore(self, past: Iterable[Past], totals: Iterable[PeriodTotal]) -> None:
        """Take over what another book has noted: `totals`, and beyond them `past`."""
        self.merge(totals)
        now, wall_s = self._clock_s(), self._wall_s()

        def then(at_s: float) -> float:
            # Of a clock that was ahead it is as if it had happened now.
            return now - max(0.0, wall_s - at_s)

        known = list(past)
        granted = [one.granted for one in known if one.granted is not None]
        for grant in sorted(granted, key=_when):
            if grant.counted and now - then(grant.at_s) < WINDOW_S:
                for key in grant.accounts:
                    self._account(key).requests.add(then(grant.at_s), 1)
        for end in sorted((one.ended for one in known if one.ended is not None), key=_when):
            self._restore_end(end, then(end.at_s), now)
        for one in known:
            if one.ended is None and one.granted is not None:
                grant = one.granted
                self._hold(grant.id, grant.accounts, grant.most, then(grant.at_s))

    def merge(self, totals: Iterable[PeriodTotal]) -> list[PeriodTotal]:
        """Count at least `totals` in the periods that they are of; return what that adds."""
        today = Today.at(self._wall_s())
        added = []
        for total in totals:
            used = self._rolled(total.account, today).named(total.period)
            if used is None:
                continue
            more = used.raise_to(total.spent)
            if more != NOTHING:
                added.append(replace(total, spent=more))
        return added

    def take_changed(self) -> list[PeriodTotal]:
        """Return the totals that have changed since this was asked."""
        changed, self._changed = self._changed, set()
        return [
            PeriodTotal(
                account=key,
                period=used.period,
                spent=Spent(tokens=used.tokens, cost_micros=used.cost_micros),
            )
            for key in changed
            for used in (self._totals[key].day, self._totals[key].month)
        ]

    def put_back(self, totals: Iterable[PeriodTotal]) -> None:
        """Note that totals could not be kept."""
        self._changed.update(total.account for total in totals)

    # Steps.

    def _desks(self, scopes: Sequence[Scope], now: float) -> list[Desk]:
        wall_s = self._wall_s()
        today = Today.at(wall_s)
        desks = []
        for scope in scopes:
            account = self._account(scope.key)
            account.trim(now)
            totals = self._totals.get(scope.key) or Totals()
            totals.roll(today)
            desks.append(Desk(scope, account, totals, now, wall_s))
        return desks

    def _account(self, key: str) -> Account:
        if key not in self._accounts:
            self._accounts[key] = Account()
        return self._accounts[key]

    def _rolled(self, key: str, today: Today) -> Totals:
        if key not in self._totals:
            self._totals[key] = Totals()
        self._totals[key].roll(today)
        return self._totals[key]

    def _grant(self, reservation: Reservation, now: float) -> None:
        accounts = tuple(scope.key for scope in reservation.scopes)
        for key in accounts:
            self._account(key).requests.add(now, 1)
        self._hold(reservation.id, accounts, reservation.most, now)
        granted = Granted(
            id=reservation.id, accounts=accounts, most=reservation.most, at_s=self._wall_s()
        )
        self._note(granted)

    def _hold(
        self, reservation_id: uuid.UUID, accounts: tuple[str, ...], most: Spent, begun_s: float
    ) -> None:
        self._held[reservation_id] = _Held(accounts, most, self._clock_s())
        for key in accounts:
            self._account(key).hold(reservation_id, most, begun_s)

    def _release(self, reservation_id: uuid.UUID, now: float) -> _Held | None:
        held = self._held.pop(reservation_id, None)
        if held is not None:
            for key in held.accounts:
                self._account(key).release(reservation_id, held.most, now)
        return held

    def _spend(self, accounts: Iterable[str], spent: Spent, now: float) -> None:
        if not spent.tokens and not spent.cost_micros:
            return
        today = Today.at(self._wall_s())
        for key in accounts:
            self._account(key).tokens.add(now, spent.tokens)
            totals = self._rolled(key, today)
            totals.add(spent, today)
            self._changed.add(key)

    def _take_back(self, expired: _Expired, now: float) -> None:
        then = Today.at(self._wall_s() - (now - expired.at_s))
        for key in expired.accounts:
            self._account(key).tokens.take_back(expired.at_s, expired.spent.tokens)
            if (totals := self._totals.get(key)) is not None:
                totals.take_back(expired.spent, then)
                self._changed.add(key)

    def _restore_end(self, end: Ended, at_s: float, now: float) -> None:
        if end.expired:
            self._expired[end.id] = _Expired(end.accounts, end.spent, at_s)
        else:
            self._settled_s[end.id] = at_s
        today, then = Today.at(self._wall_s()), Today.at(end.at_s)
        for key in end.accounts:
            if now - at_s < WINDOW_S:
                self._account(key).tokens.add(at_s, end.spent.tokens)
            totals = self._rolled(key, today)
            totals.add(end.spent, then)
            self._changed.add(key)

    def _expire(self, now: float) -> None:
        while self._settled_s and now - next(iter(self._settled_s.values())) >= TOMBSTONE_S:
            self._settled_s.popitem(last=False)
        while self._expired and now - next(iter(self._expired.values())).at_s >= LATE_S:
            self._expired.popitem(last=False)
        while self._held:
            reservation_id, held = next(iter(self._held.items()))
            if now - held.said_s <= self._renewal_timeout_s:
                break
            self._give_up(reservation_id, held, now)

    def _give_up(self, reservation_id: uuid.UUID, held: _Held, now: float) -> None:
        self._release(reservation_id, now)
        self._expired[reservation_id] = _Expired(held.accounts, held.most, now)
        self._spend(held.accounts, held.most, now)
        self._note_end(reservation_id, held.accounts, held.most, expired=True)

    def _note_end(
        self,
        reservation_id: uuid.UUID,
        accounts: tuple[str, ...],
        spent: Spent,
        *,
        expired: bool = False,
    ) -> None:
        ended = Ended(
            id=reservation_id,
            accounts=accounts,
            spent=spent,
            at_s=self._wall_s(),
            expired=expired,
        )
        self._note(ended)


def _when(change: Change) -> float:
    return change.at_s


def _strictest(desks: Iterable[Desk], most: Spent) -> Refusal | None:
    """Return the refusal that holds longest; one that waiting does not help comes first."""
    refusals = [refusal for desk in desks for refusal in desk.refusals(most)]
    if not refusals:
        return None
    return max(refusals, key=lambda r: (r.reason is Reason.TOO_LARGE, r.retry_after_s))


def _tightest(desks: Iterable[Desk], limit: Limit) -> Window | None:
    meters = ((desk, desk.meter(limit)) for desk in desks)
    limited = [(desk, meter) for desk, meter in meters if meter is not None]
    if not limited:
        return None
    desk, meter = min(limited, key=lambda one: one[1].left)
    return desk.window(meter)
