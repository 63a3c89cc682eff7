"""The limits under whatever happens: gateways that die, settles that are lost, crashes.

Up to four gateways ask one book, whose changes are written to a real journal. The book is thrown
away at any moment and made again of that journal. What really happened is kept apart and held
against the limits: nothing ever goes over one, and nothing is refused but for what was used and
what is reserved.

What happens is drawn from a seed and not step by step: so the limits are reached all the time.
"""

from __future__ import annotations

import random
import sqlite3
import uuid
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.contracts import Limit, Reason, Reservation, Scope, Settlement, Spent
from serve_app.limits import journal
from serve_app.limits.account import NOTHING
from serve_app.limits.book import Change, LimitBook, PeriodTotal
from serve_app.limits.periods import Period, utc
from serve_app.limits.window import WINDOW_S

RENEWAL_TIMEOUT_S = 15.0
RENEW_EVERY_S = 5.0
DAY_S = 86_400.0
# A window lets go what it counted this much late at most.
LATE_S = 0.06
# Each limit is the one that is reached first, of some scope: `test_every_limit_is_reached`.
SCOPES = (
    Scope(key="all", label="all", tokens_per_minute=150, concurrency=6),
    Scope(key="a", label="a", requests_per_minute=5, tokens_per_minute=100),
    Scope(key="b", label="b", concurrency=2, cost_per_day=900),
    Scope(key="c", label="c", tokens_per_month=250),
    Scope(key="d", label="d", cost_per_month=1500),
    Scope(key="e", label="e", tokens_per_day=150),
)
CHOICES = [(0,), (0, 1), (0, 2), (0, 1, 2), (1, 2), (3,), (4,), (5,), (0, 1, 3, 4, 5)]
STEPS = 120


@dataclass
class Request:
    """What really becomes of one request."""

    reservation: Reservation
    granted_s: float
    spent: Spent = NOTHING
    # When it ended, for the engine; and when the book had heard of it.
    ended_s: float | None = None
    told_s: float | None = None
    # Its gateway was killed: nobody tells what it used.
    lost: bool = False

    def bears(self, key: str) -> bool:
        return any(scope.key == key for scope in self.reservation.scopes)

    @property
    def settlement(self) -> Settlement:
        keys = tuple(scope.key for scope in self.reservation.scopes)
        return Settlement(id=self.reservation.id, accounts=keys, spent=self.spent)


@dataclass
class Gateway:
    """What one gateway knows."""

    running: list[Request] = field(default_factory=list)
    untold: list[Request] = field(default_factory=list)


class World:
    """Gateways against the real book and journal."""

    def __init__(self, gateways: int = 1, seed: int = 0) -> None:
        self.random = random.Random(seed)
        # So that the day, and the month, end in the middle of it.
        self.now_s = 1_764_547_200.0 - 120
        self.file = sqlite3.connect(":memory:", isolation_level=None)
        self.file.executescript(journal.SCHEMA)
        self.requests: list[Request] = []
        self.gateways = [Gateway() for _ in range(gateways)]
        self.up = True
        # Limits of scopes in whose way only what is reserved stood.
        self.reached: set[tuple[str, Limit]] = set()
        self.begin_book()

    def begin_book(self) -> None:
        self.changes: list[Change] = []
        self.book = LimitBook(
            lambda: self.now_s,
            lambda: self.now_s,
            note=self.changes.append,
            renewal_timeout_s=RENEWAL_TIMEOUT_S,
        )
        self.book.restore(*journal.read(self.file))

    def written(self) -> None:
        journal.write(self.file, self.changes)
        self.changes.clear()

    def step(self) -> None:
        """Let something happen."""
        steps = [
            (40, self.ask),
            (25, self.end),
            (15, self.wait),
            (4, self.crash),
            (2, self.kill_gateway),
            (2, self.go_away if self.up else self.come_back),
        ]
        weights, happens = zip(*steps, strict=True)
        [happen] = self.random.choices(happens, weights)
        happen()

    # What happens.

    def ask(self) -> None:
        if not self.up:
            return
        tokens = self.random.choice([0, 1, 5, 20, 40, 60, 110])
        scopes = tuple(SCOPES[one] for one in self.random.choice(CHOICES))
        most = Spent(tokens=tokens, cost_micros=tokens * 7)
        reservation = Reservation(id=uuid.uuid4(), scopes=scopes, most=most)
        if self.random.random() < 0.02:
            # Decided, but neither written nor answered: the gateway asks the next book.
            self.book.reserve(reservation)
            self.crash()
        refusal = self.book.reserve(reservation).refusal
        self.written()
        if refusal is None:
            request = Request(reservation, self.now_s)
            self.requests.append(request)
            self.random.choice(self.gateways).running.append(request)
            # Asked again, because the answer was lost: it is granted once.
            assert self.book.reserve(reservation).refusal is None
            self.written()
        elif refusal.reason is Reason.TOO_LARGE:
            assert refusal.asked > refusal.allowed
        else:
            [scope] = [one for one in scopes if one.label == refusal.label]
            if refusal.reason is Reason.BUSY:
                self.reached.add((scope.key, refusal.limit))
            self.was_justified(scope, refusal.limit, most)

    def end(self) -> None:
        gateway = self.random.choice(self.gateways)
        if not gateway.running:
            return
        request = gateway.running.pop(self.random.randrange(len(gateway.running)))
        self.use(request)
        if self.up and self.random.random() < 0.8:
            self.tell(request)
        else:
            gateway.untold.append(request)

    def kill_gateway(self) -> None:
        gateway = self.random.choice(self.gateways)
        for request in gateway.running:
            self.use(request)
        for request in gateway.running + gateway.untold:
            request.lost = True
        gateway.running, gateway.untold = [], []

    def crash(self) -> None:
        if self.up:
            self.begin_book()

    def go_away(self) -> None:
        self.up = False

    def come_back(self) -> None:
        self.begin_book()
        self.up = True

    def wait(self) -> None:
        left_s = self.random.choice([1, 1, 4, 8, 40, 128, 240, 480, 600]) / 8
        while left_s > 0:
            step_s = min(left_s, RENEW_EVERY_S)
            self.now_s += step_s
            left_s -= step_s
            self.renew()

    def renew(self) -> None:
        if not self.up:
            return
        for gateway in self.gateways:
            for request in gateway.untold:
                self.tell(request)
            gateway.untold = []
            held = {one.reservation.id: one.reservation for one in gateway.running}
            for unknown in self.book.renew(held):
                keys = tuple(scope.key for scope in held[unknown].scopes)
                self.book.adopt(unknown, keys, held[unknown].most)
        self.book.sweep()
        self.written()
        journal.fold(self.file, self.now_s)

    def use(self, request: Request) -> None:
        tokens = int(request.reservation.most.tokens * self.random.choice([1, 1, 0.5, 0]))
        request.spent = Spent(tokens=tokens, cost_micros=tokens * 7)
        request.ended_s = self.now_s

    def tell(self, request: Request) -> None:
        self.book.settle(request.settlement)
        self.book.settle(request.settlement)
        self.written()
        request.told_s = self.now_s

    # What must hold.

    def nothing_is_over_a_limit(self) -> None:
        for scope in SCOPES:
            for limit in Limit:
                allowed = getattr(scope, limit)
                if allowed is not None:
                    assert self.used(scope.key, limit) <= allowed, (scope.key, limit)

    def used(self, key: str, limit: Limit) -> int:
        """Return what was really used of a limit until now, told or not."""
        mine = [request for request in self.requests if request.bears(key)]
        if limit is Limit.REQUESTS_PER_MINUTE:
            return sum(self.now_s - request.granted_s < WINDOW_S for request in mine)
        if limit is Limit.CONCURRENCY:
            return sum(request.ended_s is None for request in mine)
        since_s = self.since_s(limit)
        return sum(
            request.spent.cost_micros if limit.counts_money else request.spent.tokens
            for request in mine
            if request.ended_s is not None and request.ended_s > since_s
        )

    def since_s(self, limit: Limit, late_s: float = 0.0) -> float:
        if limit.endswith("_minute"):
            return self.now_s - WINDOW_S - late_s
        # The test runs over one midnight, which also ends the month.
        midnight_s = self.now_s - self.now_s % DAY_S
        if limit.endswith("_day"):
            return midnight_s - 1 / 16
        return 1_764_547_200.0 - 1 / 16 if self.now_s >= 1_764_547_200.0 else 0.0

    def was_justified(self, scope: Scope, limit: Limit, most: Spent) -> None:
        """Check that what was used and what is reserved leaves too little."""
        mine = [request for request in self.requests if request.bears(scope.key)]
        allowed = getattr(scope, limit)
        if limit is Limit.REQUESTS_PER_MINUTE:
            recent = [r for r in mine if self.now_s - r.granted_s < WINDOW_S + LATE_S]
            # One that was granted by a book that died before it could say so counts as well.
            assert len(recent) + 1 > allowed
            return
        if limit is Limit.CONCURRENCY:
            assert sum(self.may_be_held(request) for request in mine) + 1 > allowed
            return
        asked = most.cost_micros if limit.counts_money else most.tokens
        assert sum(self.counted(request, limit) for request in mine) + asked > allowed

    def may_be_held(self, request: Request) -> bool:
        """Whether the book may take a request to be under way."""
        return request.told_s is None and not self.given_up(request)

    def given_up(self, request: Request) -> bool:
        return request.lost and request.reservation.id in self.book._expired

    def counted(self, request: Request, limit: Limit) -> int:
        """Return the most of a request that the book may count against a limit."""
        spent, most = request.spent, request.reservation.most
        since_s = self.since_s(limit, LATE_S)
        if request.told_s is None:
            # Reserved; or lost with its gateway, and counted in full from when it is given up.
            expired = self.book._expired.get(request.reservation.id)
            counts = expired is None or expired.at_s > since_s
            amount = most if counts else Spent()
        else:
            amount = spent if request.told_s > since_s else Spent()
        return amount.cost_micros if limit.counts_money else amount.tokens

    def no_window_is_over_its_limit(self, key: str, allowed: int) -> None:
        """Check the tokens of any 60 s also as if each request used them when it began."""
        begun = sorted((r.granted_s, r.spent.tokens) for r in self.requests if r.bears(key))
        for first_s, _ in begun:
            assert sum(t for at_s, t in begun if 0 <= at_s - first_s < WINDOW_S) <= allowed


@settings(max_examples=150, deadline=None)
@given(gateways=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
def test_no_limit_is_passed_and_none_refuses_too_early(gateways: int, seed: int) -> None:
    world = World(gateways, seed)
    for _ in range(STEPS):
        world.step()
        world.nothing_is_over_a_limit()
    for scope in SCOPES:
        if scope.tokens_per_minute is not None:
            world.no_window_is_over_its_limit(scope.key, scope.tokens_per_minute)
    world.file.close()


def test_every_limit_is_reached() -> None:
    """Else the property above says nothing of it."""
    reached = set()
    for seed in range(40):
        world = World(gateways=2, seed=seed)
        for _ in range(STEPS):
            world.step()
        reached |= world.reached
        world.file.close()
    limited = {(s.key, limit) for s in SCOPES for limit in Limit if getattr(s, limit) is not None}
    assert reached == limited


# What is used here; what another journal is said to have used in all; or the process ends.
_TOTALS_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("use"), st.integers(0, 50), st.integers(0, 50)),
        st.tuples(st.just("told"), st.integers(0, 200), st.integers(0, 200)),
        st.just(("crash", 0, 0)),
    ),
    max_size=30,
)


@settings(max_examples=150, deadline=None)
@given(steps=_TOTALS_STEPS)
def test_what_others_have_used_is_counted_once(steps: list[tuple[str, int, int]]) -> None:
    world = World()
    most = 10**6
    scope = Scope(
        key="a", label="a", tokens_per_day=most, tokens_per_month=most, cost_per_month=most
    )
    tokens = micros = 0
    for what, some_tokens, some_micros in steps:
        some = Spent(tokens=some_tokens, cost_micros=some_micros)
        if what == "use":
            world.book.settle(Settlement(id=uuid.uuid4(), accounts=(scope.key,), spent=some))
            tokens, micros = tokens + some_tokens, micros + some_micros
        elif what == "told":
            told = [
                PeriodTotal(account=scope.key, period=period.key(utc(world.now_s)), spent=some)
                for period in Period
            ]
            journal.add(world.file, world.book.merge(told))
            assert world.book.merge(told) == []
            tokens, micros = max(tokens, some_tokens), max(micros, some_micros)
        else:
            world.begin_book()
        world.written()
        left = {state.limit: state.window.remaining for state in world.book.standing([scope])}
        assert left[Limit.TOKENS_PER_DAY] == left[Limit.TOKENS_PER_MONTH] == most - tokens
        assert left[Limit.COST_PER_MONTH] == most - micros
    world.file.close()


def test_the_check_would_see_a_limit_that_is_passed() -> None:
    world = World()
    reservation = Reservation(id=uuid.uuid4(), scopes=(SCOPES[1],), most=Spent(tokens=101))
    world.requests.append(Request(reservation, world.now_s, Spent(tokens=101), world.now_s))
    with pytest.raises(AssertionError):
        world.nothing_is_over_a_limit()
