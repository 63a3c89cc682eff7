"""What one scope has used and holds, and what its limits say to that."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from serve_app.contracts import Limit, LimitState, Reason, Refusal, Scope, Spent, Window
from serve_app.limits.periods import Period, Today, utc
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

    def roll(self, today: Today) -> None:
        """Begin this day and this month, unless they have begun."""
        self.day.roll(today.day)
        self.month.roll(today.month)

    def named(self, period: str) -> Used | None:
        """Return what was used in `period`; None if it is another one."""
        return next((used for used in (self.day, self.month) if used.period == period), None)

    def add(self, spent: Spent, then: Today) -> None:
        """Count `spent` of `then`, where that is not over."""
        for used in self._of(then):
            used.tokens += spent.tokens
            used.cost_micros += spent.cost_micros

    def take_back(self, spent: Spent, then: Today) -> None:
        """Count `spent` of `then` no more; of a period that is over nothing is taken back."""
        for used in self._of(then):
            used.tokens -= spent.tokens
            used.cost_micros -= spent.cost_micros

    def _of(self, then: Today) -> Iterator[Used]:
        if self.day.period == then.day:
            yield self.day
        if self.month.period == then.month:
            yield self.month


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


class Meter(NamedTuple):
    """One limit: what it allows, what was used of it, what is reserved, what is asked."""

    limit: Limit
    allowed: int
    used: int
    reserved: int
    asked: int

    @property
    def left(self) -> int:
        """What may still be asked for."""
        return max(0, self.allowed - self.used - self.reserved)


_PERIODS = {
    Limit.TOKENS_PER_DAY: Period.DAY,
    Limit.COST_PER_DAY: Period.DAY,
    Limit.TOKENS_PER_MONTH: Period.MONTH,
    Limit.COST_PER_MONTH: Period.MONTH,
}


@dataclass(slots=True)
class Desk:
    """A scope before its account at one moment: `now` of the windows, `wall_s` of the periods."""

    scope: Scope
    account: Account
    totals: Totals
    now: float
    wall_s: float

    def meter(self, limit: Limit) -> Meter | None:
        """Return how `limit` stands, if there is one."""
        row = _ROWS[limit]
        allowed: int | None = getattr(self.scope, row.name)
        if allowed is None:
            return None
        return Meter(limit, allowed, *row.read(self.account, self.totals), 0)

    def refusals(self, most: Spent) -> Iterator[Refusal]:
        """Yield why a request that may use `most` is not granted; nothing if it is."""
        for limit, row in _ROWS.items():
            allowed: int | None = getattr(self.scope, row.name)
            # Nothing is asked of a limit of tokens by a request that uses none.
            if allowed is None or not (asked := row.asked(most)):
                continue
            used, reserved = row.read(self.account, self.totals)
            if used + reserved + asked > allowed:
                yield self._refusal(Meter(limit, allowed, used, reserved, asked))

    def states(self) -> Iterator[LimitState]:
        """Yield every limit of the scope as it stands."""
        for limit in _ROWS:
            if (meter := self.meter(limit)) is not None:
                yield LimitState(scope=self.scope.label, limit=limit, window=self.window(meter))

    def window(self, meter: Meter) -> Window:
        """Return what is told of a limit."""
        return Window(limit=meter.allowed, remaining=meter.left, reset_s=self._reset_s(meter))

    def _refusal(self, meter: Meter) -> Refusal:
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

    def _reason(self, meter: Meter) -> tuple[Reason, float]:
        if meter.asked > meter.allowed:
            return Reason.TOO_LARGE, 0.0
        one_ends_s = self.account.until_one_ends_s(self.now)
        if (period := _PERIODS.get(meter.limit)) is None:
            return Reason.BUSY, self._until_freed_s(meter, one_ends_s)
        ends_s = period.ends_in_s(utc(self.wall_s))
        if meter.used + meter.asked <= meter.allowed:
            # Only what is reserved stands in the way, most of which is given back.
            return Reason.BUSY, min(one_ends_s, ends_s)
        return Reason.SPENT, ends_s

    def _until_freed_s(self, meter: Meter, one_ends_s: float) -> float:
        missing = meter.used + meter.reserved + meter.asked - meter.allowed
        freed_s = None
        if (window := self._window_of(meter.limit)) is not None:
            freed_s = window.freed_in_s(self.now, missing)
        return one_ends_s if freed_s is None else freed_s

    def _reset_s(self, meter: Meter) -> float:
        if (period := _PERIODS.get(meter.limit)) is not None:
            return period.ends_in_s(utc(self.wall_s))
        if (window := self._window_of(meter.limit)) is None:
            return self.account.until_one_ends_s(self.now) if meter.reserved else 0.0
        # What is under way leaves the window 60 s after its end.
        return WINDOW_S if meter.reserved else window.empty_in_s(self.now)

    def _window_of(self, limit: Limit) -> SlidingWindow | None:
        if limit is Limit.REQUESTS_PER_MINUTE:
            return self.account.requests
        return self.account.tokens if limit is Limit.TOKENS_PER_MINUTE else None


class _Row(NamedTuple):
    """How one limit is read: its field of a scope, what was used and what is reserved of it, and
    what a request that may use so much asks of it."""

    name: str
    read: Callable[[Account, Totals], tuple[int, int]]
    asked: Callable[[Spent], int]


def _one(_: Spent) -> int:
    return 1


def _tokens(most: Spent) -> int:
    return most.tokens


def _micros(most: Spent) -> int:
    return most.cost_micros


# By name, because a request passes all of them: an enum's `value` is slow.
_ROWS: dict[Limit, _Row] = {
    Limit.REQUESTS_PER_MINUTE: _Row(
        "requests_per_minute", lambda account, _: (account.requests.total, 0), _one
    ),
    Limit.TOKENS_PER_MINUTE: _Row(
        "tokens_per_minute",
        lambda account, _: (account.tokens.total, account.reserved_tokens),
        _tokens,
    ),
    Limit.CONCURRENCY: _Row("concurrency", lambda account, _: (0, len(account.held)), _one),
    Limit.TOKENS_PER_DAY: _Row(
        "tokens_per_day",
        lambda account, totals: (totals.day.tokens, account.reserved_tokens),
        _tokens,
    ),
    Limit.TOKENS_PER_MONTH: _Row(
        "tokens_per_month",
        lambda account, totals: (totals.month.tokens, account.reserved_tokens),
        _tokens,
    ),
    Limit.COST_PER_DAY: _Row(
        "cost_per_day",
        lambda account, totals: (totals.day.cost_micros, account.reserved_micros),
        _micros,
    ),
    Limit.COST_PER_MONTH: _Row(
        "cost_per_month",
        lambda account, totals: (totals.month.cost_micros, account.reserved_micros),
        _micros,
    ),
}
