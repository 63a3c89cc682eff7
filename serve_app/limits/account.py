"""What one scope has used and holds, and what its limits say to that."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime

from serve_app.contracts import Limit, LimitState, Reason, Refusal, Scope, Spent, Window
from serve_app.limits.periods import Period
from serve_app.limits.window import WINDOW_S, SlidingWindow

# Where nothing is known yet of how long the requests of an account take.
_BUSY_RETRY_S = 1.0
# Of the latest request in the mean duration.
_LATEST_SHARE = 0.2

NOTHING = Spent()


@dataclass(slots=True)
class Used:
    """What was used in one period, the latest."""

    period: str = ""
    tokens: int = 0
    cost_micros: int = 0

    def roll(self, period: str) -> None:
        """Begin `period`, unless it has begun. A clock that goes back begins none."""
        if period > self.period:
            self.period, self.tokens, self.cost_micros = period, 0, 0

    def raise_to(self, spent: Spent) -> Spent:
        """Count at least `spent`; return what that adds."""
        more = Spent(
            tokens=max(0, spent.tokens - self.tokens),
            cost_micros=max(0, spent.cost_micros - self.cost_micros),
        )
        self.tokens += more.tokens
        self.cost_micros += more.cost_micros
        return more


@dataclass(slots=True)
class Totals:
    """What was used in this day and in this month."""

    day: Used = field(default_factory=Used)
    month: Used = field(default_factory=Used)

    def roll(self, moment: datetime) -> None:
        """Begin the day and the month of `moment`, unless they have begun."""
        self.day.roll(Period.DAY.key(moment))
        self.month.roll(Period.MONTH.key(moment))

    def named(self, period: str) -> Used | None:
        """Return what was used in `period`; None if it is another one."""
        return next((used for used in (self.day, self.month) if used.period == period), None)

    def add(self, spent: Spent, moment: datetime | None = None) -> None:
        """Count `spent`, at `moment` or now."""
        for used in self._of(moment):
            used.tokens += spent.tokens
            used.cost_micros += spent.cost_micros

    def take_back(self, spent: Spent, moment: datetime) -> None:
        """Count `spent` of `moment` no more; of a period that is over nothing is taken back."""
        for used in self._of(moment):
            used.tokens -= spent.tokens
            used.cost_micros -= spent.cost_micros

    def _of(self, moment: datetime | None) -> Iterator[Used]:
        for period, used in ((Period.DAY, self.day), (Period.MONTH, self.month)):
            if moment is None or used.period == period.key(moment):
                yield used


@dataclass(slots=True)
class Account:
    """The requests of one scope: those of the last minute, and those under way.

    Tokens are counted as they were reserved while a request is under way, and as they were used
    for 60 s after it has ended. So in no 60 s were more generated than the limit, whenever in its
    time a request generated them.
    """

    requests: SlidingWindow = field(default_factory=SlidingWindow)
    tokens: SlidingWindow = field(default_factory=SlidingWindow)
    # id → when it began; the oldest comes first.
    held: dict[uuid.UUID, float] = field(default_factory=dict)
    reserved_tokens: int = 0
    reserved_micros: int = 0
    # How long its requests take, the latest counting most; None before the first has ended.
    duration_s: float | None = None

    def hold(self, reservation_id: uuid.UUID, most: Spent, begun_s: float) -> None:
        """Note a request that has begun."""
        self.held[reservation_id] = begun_s
        self.reserved_tokens += most.tokens
        self.reserved_micros += most.cost_micros

    def release(self, reservation_id: uuid.UUID, most: Spent, now: float) -> None:
        """Note that a request which was held is over."""
        self.reserved_tokens -= most.tokens
        self.reserved_micros -= most.cost_micros
        took_s = now - self.held.pop(reservation_id)
        known_s = took_s if self.duration_s is None else self.duration_s
        self.duration_s = known_s + _LATEST_SHARE * (took_s - known_s)

    def trim(self, now: float) -> None:
        """Let go what has left the windows."""
        self.requests.trim(now)
        self.tokens.trim(now)

    @property
    def idle(self) -> bool:
        """Whether it holds nothing and nothing of the last minute."""
        return not self.held and not self.requests.total and not self.tokens.total

    def until_one_ends_s(self, now: float) -> float:
        """Return when the oldest request should be over, as the requests of the account go."""
        if self.duration_s is None or not self.held:
            return _BUSY_RETRY_S
        left_s = self.duration_s - (now - next(iter(self.held.values())))
        # It takes longer than most. Of many, one ends about this often.
        return left_s if left_s > 0 else self.duration_s / len(self.held)


@dataclass(frozen=True, slots=True)
class _Meter:
    """One limit: what it allows, what was used of it, what is reserved, what is asked."""

    limit: Limit
    allowed: int
    used: int
    reserved: int
    asked: int

    @property
    def left(self) -> int:
        return max(0, self.allowed - self.used - self.reserved)

    @property
    def granted(self) -> bool:
        return not self.asked or self.used + self.reserved + self.asked <= self.allowed


_PERIODS = {
    Limit.TOKENS_PER_DAY: Period.DAY,
    Limit.COST_PER_DAY: Period.DAY,
    Limit.TOKENS_PER_MONTH: Period.MONTH,
    Limit.COST_PER_MONTH: Period.MONTH,
}


@dataclass(frozen=True, slots=True)
class Desk:
    """A scope before its account at one moment: `now` of the windows, `moment` of the periods."""

    scope: Scope
    account: Account
    totals: Totals
    now: float
    moment: datetime

    def refusals(self, most: Spent) -> Iterator[Refusal]:
        """Yield why a request that may use `most` is not granted; nothing if it is."""
        for meter in self._meters(most, requests=1):
            if not meter.granted:
                yield self._refusal(meter)

    def states(self) -> list[LimitState]:
        """Return every limit of the scope as it stands."""
        return [
            LimitState(scope=self.scope.label, limit=meter.limit, window=self._window(meter))
            for meter in self._meters(NOTHING, requests=0)
        ]

    def _meters(self, most: Spent, *, requests: int) -> Iterator[_Meter]:
        account, totals = self.account, self.totals
        tokens = (account.reserved_tokens, most.tokens)
        micros = (account.reserved_micros, most.cost_micros)
        for limit, used, reserved, asked in (
            (Limit.REQUESTS_PER_MINUTE, account.requests.total, 0, requests),
            (Limit.TOKENS_PER_MINUTE, account.tokens.total, *tokens),
            (Limit.CONCURRENCY, 0, len(account.held), requests),
            (Limit.TOKENS_PER_DAY, totals.day.tokens, *tokens),
            (Limit.TOKENS_PER_MONTH, totals.month.tokens, *tokens),
            (Limit.COST_PER_DAY, totals.day.cost_micros, *micros),
            (Limit.COST_PER_MONTH, totals.month.cost_micros, *micros),
        ):
            allowed: int | None = getattr(self.scope, limit)
            if allowed is not None:
                yield _Meter(limit, allowed, used, reserved, asked)

    def _refusal(self, meter: _Meter) -> Refusal:
        reason, retry_after_s = self._reason(meter)
        return Refusal(
            reason=reason,
            limit=meter.limit,
            label=self.scope.label,
            allowed=meter.allowed,
            asked=meter.asked,
            left=meter.left,
            retry_after_s=retry_after_s,
        )

    def _reason(self, meter: _Meter) -> tuple[Reason, float]:
        if meter.asked > meter.allowed:
            return Reason.TOO_LARGE, 0.0
        one_ends_s = self.account.until_one_ends_s(self.now)
        if (period := _PERIODS.get(meter.limit)) is None:
            return Reason.BUSY, self._until_freed_s(meter, one_ends_s)
        ends_s = period.ends_in_s(self.moment)
        if meter.used + meter.asked <= meter.allowed:
            # Only what is reserved stands in the way, most of which is given back.
            return Reason.BUSY, min(one_ends_s, ends_s)
        return Reason.SPENT, ends_s

    def _until_freed_s(self, meter: _Meter, one_ends_s: float) -> float:
        missing = meter.used + meter.reserved + meter.asked - meter.allowed
        freed_s = None
        if (window := self._window_of(meter.limit)) is not None:
            freed_s = window.freed_in_s(self.now, missing)
        return one_ends_s if freed_s is None else freed_s

    def _window(self, meter: _Meter) -> Window:
        return Window(limit=meter.allowed, remaining=meter.left, reset_s=self._reset_s(meter))

    def _reset_s(self, meter: _Meter) -> float:
        if (period := _PERIODS.get(meter.limit)) is not None:
            return period.ends_in_s(self.moment)
        if (window := self._window_of(meter.limit)) is None:
            return self.account.until_one_ends_s(self.now) if meter.reserved else 0.0
        # What is under way leaves the window 60 s after its end.
        return WINDOW_S if meter.reserved else window.empty_in_s(self.now)

    def _window_of(self, limit: Limit) -> SlidingWindow | None:
        if limit is Limit.REQUESTS_PER_MINUTE:
            return self.account.requests
        return self.account.tokens if limit is Limit.TOKENS_PER_MINUTE else None
