"""The counters of the limits, with a clock that the test moves."""

from __future__ import annotations

import math
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.contracts import (
    Limit,
    Reason,
    Refusal,
    Reservation,
    Scope,
    Settlement,
    Spent,
    Window,
)
from serve_app.limits.book import LimitBook
from serve_app.limits.headers import duration_text
from serve_app.limits.window import WINDOW_S

RENEWAL_TIMEOUT_S = 15.0


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Book(LimitBook):
    """A LimitBook with shorter calls."""

    def __init__(self) -> None:
        self.clock = Clock()
        super().__init__(self.clock, self.clock, renewal_timeout_s=RENEWAL_TIMEOUT_S)

    def take(
        self,
        policy: dict[str, int],
        reservation_id: uuid.UUID | None = None,
        *,
        principal: str = "u",
        tokens: int = 0,
    ) -> Refusal | None:
        """Reserve."""
        return self.reserve(
            Reservation(
                id=reservation_id or uuid.uuid4(),
                scopes=(scope(principal, **policy),),
                most=Spent(tokens=tokens),
            )
        ).refusal

    def end(self, reservation_id: uuid.UUID, *, principal: str = "u", tokens: int = 0) -> None:
        """Settle."""
        spent = Spent(tokens=tokens)
        self.settle(Settlement(id=reservation_id, accounts=(principal,), spent=spent))

    def hold(self, reservation_id: uuid.UUID, *, tokens: int = 0) -> None:
        """Renew, and adopt what is not known."""
        for unknown in self.renew([reservation_id]):
            self.adopt(unknown, ("u",), Spent(tokens=tokens))


def scope(key: str = "u", **limits: int) -> Scope:
    """Return a scope."""
    return Scope(key=key, label="you", **limits)


@pytest.fixture
def book() -> Book:
    return Book()


ONE_AT_ONCE = {"concurrency": 1}
NO_LIMIT: dict[str, int] = {}


# Requests a minute. Steps are multiples of 1/8 s, so that the arithmetic is exact.


@given(
    allowed=st.integers(1, 5),
    steps=st.lists(st.integers(0, 30 * 8).map(lambda eighths: eighths / 8), max_size=60),
)
def test_window_is_exact(allowed: int, steps: list[float]) -> None:
    book, policy = Book(), {"requests_per_minute": allowed}
    granted: list[float] = []
    for step in steps:
        book.clock.now_s += step
        now = book.clock.now_s
        recent = [at for at in granted if now - at < WINDOW_S]
        refusal = book.take(policy)
        # Never over the limit, never refused below it.
        assert (refusal is None) == (len(recent) < allowed)
        if refusal is None:
            granted.append(now)
        else:
            assert refusal.retry_after_s == recent[-allowed] + WINDOW_S - now
            assert 0 < refusal.retry_after_s <= WINDOW_S


@given(steps=st.lists(st.integers(0, 20 * 8).map(lambda eighths: eighths / 8), max_size=20))
def test_retry_after_is_the_first_moment_that_succeeds(steps: list[float]) -> None:
    book, policy = Book(), {"requests_per_minute": 2}
    for step in steps:
        book.clock.now_s += step
        refusal = book.take(policy)
        if refusal is not None:
            book.clock.now_s += refusal.retry_after_s - 1 / 8
            assert book.take(policy) is not None
            book.clock.now_s += 1 / 8
            assert book.take(policy) is None


def test_lowered_limit_counts_what_was_granted_before(book: Book) -> None:
    for _ in range(5):
        assert book.take({"requests_per_minute": 5}) is None
        book.clock.now_s += 1
    refusal = book.take({"requests_per_minute": 2})
    # Four of the five must leave the window: the fourth came two seconds ago.
    assert refusal is not None
    assert refusal.retry_after_s == WINDOW_S - 2


def test_refused_request_takes_nothing(book: Book) -> None:
    policy = {"requests_per_minute": 1}
    assert book.take(policy) is None
    for _ in range(100):
        book.clock.now_s += WINDOW_S / 101
        assert book.take(policy) is not None
    book.clock.now_s = 1000 + WINDOW_S
    assert book.take(policy) is None


def test_settled_request_stays_in_the_window(book: Book) -> None:
    one = uuid.uuid4()
    assert book.take({"requests_per_minute": 1}, one) is None
    book.end(one)
    assert book.take({"requests_per_minute": 1}) is not None


def test_principals_have_windows_of_their_own(book: Book) -> None:
    policy = {"requests_per_minute": 1}
    assert book.take(policy, principal="a") is None
    assert book.take(policy, principal="b") is None


def test_error_names_the_limit_and_the_time() -> None:
    refusal = Refusal(
        reason=Reason.BUSY,
        limit=Limit.REQUESTS_PER_MINUTE,
        label="your API key",
        allowed=10,
        asked=1,
        left=0,
        retry_after_s=12.3,
    )
    error = refusal.error(None)
    assert error.message == (
        "The limit of 10 requests per minute for your API key is reached. Try again in 13 s."
    )
    assert error.retry_after_s is not None
    assert math.ceil(error.retry_after_s) == 13


# Concurrency.


def test_concurrency(book: Book) -> None:
    policy = {"concurrency": 2}
    first, second = uuid.uuid4(), uuid.uuid4()
    assert book.take(policy, first) is None
    assert book.take(policy, second) is None
    refusal = book.take(policy)
    assert refusal is not None
    assert (refusal.limit, refusal.allowed) == (Limit.CONCURRENCY, 2)
    assert refusal.retry_after_s > 0
    book.end(first)
    assert book.take(policy) is None
    assert book.take(policy) is not None


def test_refused_concurrency_leaves_no_stamp_in_the_window(book: Book) -> None:
    first = uuid.uuid4()
    policy = {"concurrency": 1, "requests_per_minute": 2}
    assert book.take(policy, first) is None
    assert book.take(policy) is not None
    book.end(first)
    assert book.take(policy) is None


def test_repeated_id_is_granted_once(book: Book) -> None:
    policy = {"concurrency": 1, "requests_per_minute": 1}
    one = uuid.uuid4()
    assert [book.take(policy, one) for _ in range(3)] == [None] * 3
    assert book.held("u") == 1
    book.end(one)
    assert book.held("u") == 0


def test_settle_that_overtakes_its_reserve_leaves_nothing_held(book: Book) -> None:
    one = uuid.uuid4()
    book.end(one)
    assert book.take(ONE_AT_ONCE, one) is None
    assert book.held("u") == 0
    assert book.take(ONE_AT_ONCE) is None


def test_settling_twice_gives_back_once(book: Book) -> None:
    policy = {"concurrency": 2}
    first = uuid.uuid4()
    for one in (first, uuid.uuid4()):
        assert book.take(policy, one) is None
    book.end(first)
    book.end(first)
    assert book.held("u") == 1


# Holders.


def test_silent_holder_loses_its_reservations(book: Book) -> None:
    assert book.take(ONE_AT_ONCE, principal="dead") is None
    assert book.take(ONE_AT_ONCE, principal="live") is None
    book.clock.now_s += RENEWAL_TIMEOUT_S
    book.renew([])
    book.clock.now_s += 1
    book.sweep()
    assert book.held("dead") == 0
    assert book.take(ONE_AT_ONCE, principal="dead") is None


def test_holder_that_renews_keeps_its_reservations(book: Book) -> None:
    one = uuid.uuid4()
    assert book.take(ONE_AT_ONCE, one) is None
    for _ in range(10):
        book.clock.now_s += RENEWAL_TIMEOUT_S
        book.hold(one)
        assert book.take(ONE_AT_ONCE) is not None


def test_reservation_that_its_holder_no_longer_renews_ends(book: Book) -> None:
    # Its settle was lost on the way, and the holder lives on.
    lost, kept = uuid.uuid4(), uuid.uuid4()
    for one in (lost, kept):
        assert book.take(NO_LIMIT, one) is None
    for _ in range(4):
        book.clock.now_s += RENEWAL_TIMEOUT_S / 3
        book.hold(kept)
        book.sweep()
    assert book.held("u") == 1


def test_reservation_that_is_younger_than_the_list_is_kept(book: Book) -> None:
    # The list was made before the reservation was granted.
    assert book.take(ONE_AT_ONCE) is None
    book.renew([])
    assert book.held("u") == 1


def test_renew_adopts_what_a_new_book_does_not_know(book: Book) -> None:
    one = uuid.uuid4()
    book.hold(one)
    assert book.held("u") == 1
    assert book.take(ONE_AT_ONCE) is not None
    book.end(one)
    assert book.take(ONE_AT_ONCE) is None


def test_renew_does_not_bring_back_what_was_settled(book: Book) -> None:
    one = uuid.uuid4()
    assert book.take(ONE_AT_ONCE, one) is None
    book.end(one)
    book.hold(one)
    assert book.held("u") == 0


# Memory.


def test_sweep_forgets_the_idle(book: Book) -> None:
    for number in range(100):
        one = uuid.uuid4()
        assert book.take({"requests_per_minute": 9}, one, principal=str(number)) is None
        book.end(one)
    book.clock.now_s += WINDOW_S
    book.sweep()
    assert not book._accounts
    assert not book._settled_s
    assert not book._held


def test_a_window_is_bounded_whatever_the_limit(book: Book) -> None:
    for _ in range(20_000):
        book.clock.now_s += 1 / 128
        book.take({"requests_per_minute": 1_000_000})
    assert len(book._accounts["u"].requests._entries) <= 1001


# What is told of the limits.


def test_allowance_tells_what_is_left(book: Book) -> None:
    policy = {"requests_per_minute": 2}

    def told() -> Window | None:
        request = Reservation(id=uuid.uuid4(), scopes=(scope(**policy),))
        return book.reserve(request).requests

    assert told() == Window(limit=2, remaining=1, reset_s=60.0)
    book.clock.now_s += 10
    assert told() == Window(limit=2, remaining=0, reset_s=60.0)
    book.clock.now_s += 10
    # Refused: nothing is taken, and all of it is back when the second leaves the window.
    assert told() == Window(limit=2, remaining=0, reset_s=50.0)
    book.clock.now_s += 60
    assert told() == Window(limit=2, remaining=1, reset_s=60.0)


def test_nothing_is_told_of_what_is_not_limited(book: Book) -> None:
    request = Reservation(id=uuid.uuid4(), scopes=(scope(),))
    assert book.reserve(request).requests is None


def test_busy_principal_is_told_when_its_oldest_request_should_end(book: Book) -> None:
    first = book.take(ONE_AT_ONCE)
    assert first is None
    unknown = book.take(ONE_AT_ONCE)
    assert unknown is not None
    assert unknown.retry_after_s == 1.0  # nothing is known yet

    book = Book()
    earlier = uuid.uuid4()
    book.take(ONE_AT_ONCE, earlier)
    book.clock.now_s += 8
    book.end(earlier)
    book.take(ONE_AT_ONCE)
    book.clock.now_s += 3
    busy = book.take(ONE_AT_ONCE)
    assert busy is not None
    assert busy.retry_after_s == 5.0
    book.clock.now_s += 10
    overdue = book.take(ONE_AT_ONCE)
    assert overdue is not None
    assert overdue.retry_after_s == 8.0


def test_latest_requests_count_most_for_the_time_to_wait(book: Book) -> None:
    for seconds in (10, 20):
        one = uuid.uuid4()
        book.take(ONE_AT_ONCE, one)
        book.clock.now_s += seconds
        book.end(one)
    book.take(ONE_AT_ONCE)
    busy = book.take(ONE_AT_ONCE)
    assert busy is not None
    assert busy.retry_after_s == pytest.approx(12.0)


def test_settle_that_comes_twice_counts_once(book: Book) -> None:
    one = uuid.uuid4()
    book.take(ONE_AT_ONCE, one)
    book.clock.now_s += 4
    book.end(one)
    book.clock.now_s += 4
    book.end(one)
    book.take(ONE_AT_ONCE)
    busy = book.take(ONE_AT_ONCE)
    assert busy is not None
    assert busy.retry_after_s == 4.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.0004, "1ms"),
        (0.12, "120ms"),
        (1, "1s"),
        (8.64, "8.64s"),
        (59.9996, "1m0s"),
        (360, "6m0s"),
        (3661.5, "1h1m1.5s"),
    ],
)
def test_reset_is_written_as_openai_writes_it(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


# Tokens, money and budgets.

DAY_S = 86_400.0


def reservation(*scopes: Scope, tokens: int = 0, cost_micros: int = 0) -> Reservation:
    return Reservation(
        id=uuid.uuid4(), scopes=scopes, most=Spent(tokens=tokens, cost_micros=cost_micros)
    )


def settlement(of: Reservation, *, tokens: int = 0, cost_micros: int = 0) -> Settlement:
    return Settlement(
        id=of.id,
        accounts=tuple(scope.key for scope in of.scopes),
        spent=Spent(tokens=tokens, cost_micros=cost_micros),
    )


def left(book: Book, one: Scope, limit: Limit) -> int:
    [state] = [state for state in book.standing([one]) if state.limit is limit]
    return state.window.remaining


def test_tokens_are_reserved_and_then_settled(book: Book) -> None:
    one = scope(tokens_per_minute=100)
    first = reservation(one, tokens=80)
    assert book.reserve(first).tokens == Window(limit=100, remaining=20, reset_s=60.0)
    refused = book.reserve(reservation(one, tokens=30))
    assert refused.refusal is not None
    assert refused.refusal.reason is Reason.BUSY
    book.settle(settlement(first, tokens=50))
    book.clock.now_s += 1
    assert book.reserve(reservation(one, tokens=50)).tokens == Window(
        limit=100, remaining=0, reset_s=60.0
    )


def test_what_was_used_counts_for_a_minute_after_the_end(book: Book) -> None:
    one = scope(tokens_per_minute=100)
    first = reservation(one, tokens=100)
    book.reserve(first)
    for _ in range(4):
        book.clock.now_s += 15
        book.renew([first.id])
    assert left(book, one, Limit.TOKENS_PER_MINUTE) == 0  # it is still under way
    book.settle(settlement(first, tokens=100))
    book.clock.now_s += WINDOW_S - 1
    refusal = book.reserve(reservation(one, tokens=1)).refusal
    assert refusal is not None
    assert refusal.retry_after_s == 1.0
    book.clock.now_s += 1
    assert book.reserve(reservation(one, tokens=100)).refusal is None


@pytest.mark.parametrize("limit", [Limit.TOKENS_PER_DAY, Limit.TOKENS_PER_MONTH])
def test_budget_is_renewed_with_its_period(book: Book, limit: Limit) -> None:
    book.clock.now_s = 1_764_547_200.0 - 3600  # an hour before December 2025
    one = scope(**{limit: 100})
    first = reservation(one, tokens=100)
    assert book.reserve(first).refusal is None
    book.settle(settlement(first, tokens=90))
    refusal = book.reserve(reservation(one, tokens=20)).refusal
    assert refusal is not None
    assert (refusal.reason, refusal.left, refusal.retry_after_s) == (Reason.SPENT, 10, 3600.0)
    error = refusal.error(None)
    assert (error.status, error.type, error.code) == (
        429,
        "insufficient_quota",
        "insufficient_quota",
    )
    assert error.message == (
        f"Of the budget of 100 tokens{limit.period} for you, 10 tokens are left, and the request "
        "may take up to 20 tokens. The budget is renewed in 3600 s."
    )
    book.clock.now_s += 3600
    assert book.reserve(reservation(one, tokens=100)).refusal is None


def test_what_ends_after_midnight_counts_in_the_new_day(book: Book) -> None:
    book.clock.now_s = DAY_S * 20_000 - 10
    one = scope(tokens_per_day=100)
    first = reservation(one, tokens=60)
    book.reserve(first)
    book.clock.now_s += 10
    assert book.reserve(reservation(one, tokens=60)).refusal is not None
    book.settle(settlement(first, tokens=60))
    assert left(book, one, Limit.TOKENS_PER_DAY) == 40


def test_money_is_a_budget_of_its_own(book: Book) -> None:
    one = scope(cost_per_day=2_500_000)
    first = reservation(one, tokens=10, cost_micros=2_000_000)
    assert book.reserve(first).refusal is None
    refusal = book.reserve(reservation(one, cost_micros=1_000_000)).refusal
    assert refusal is not None
    assert refusal.reason is Reason.BUSY  # only what is reserved stands in the way
    book.settle(settlement(first, tokens=10, cost_micros=1_600_000))
    refusal = book.reserve(reservation(one, cost_micros=1_000_000)).refusal
    assert refusal is not None
    assert refusal.reason is Reason.SPENT
    assert refusal.error("EUR").message.startswith(
        "Of the budget of 2.5 EUR per day for you, 0.9 EUR are left, and the request may take "
        "up to 1 EUR."
    )


def test_what_can_never_fit_is_told_so(book: Book) -> None:
    refusal = book.reserve(reservation(scope(tokens_per_minute=100), tokens=101)).refusal
    assert refusal is not None
    error = refusal.error(None)
    assert (error.status, error.code) == (400, "request_over_limit")
    assert error.retry_after_s is None
    assert error.message == (
        "The request may take up to 101 tokens, which is more than the limit of 100 tokens per "
        "minute for you. Ask for fewer tokens or send less."
    )


def test_request_that_takes_no_tokens_passes_a_spent_budget(book: Book) -> None:
    one = scope(tokens_per_day=100)
    first = reservation(one, tokens=100)
    book.reserve(first)
    book.settle(settlement(first, tokens=120))  # more than it had reserved
    assert left(book, one, Limit.TOKENS_PER_DAY) == 0
    assert book.reserve(reservation(one)).refusal is None


def test_all_scopes_must_grant_and_what_one_refuses_takes_from_none(book: Book) -> None:
    wide, narrow = scope("wide", tokens_per_minute=100), scope("narrow", tokens_per_minute=50)
    refusal = book.reserve(reservation(wide, narrow, tokens=60)).refusal
    assert refusal is not None
    assert refusal.allowed == 50
    assert left(book, wide, Limit.TOKENS_PER_MINUTE) == 100
    told = book.reserve(reservation(wide, narrow, tokens=40)).tokens
    assert told == Window(limit=50, remaining=10, reset_s=60.0)
    assert left(book, wide, Limit.TOKENS_PER_MINUTE) == 60


def test_of_several_refusals_the_longest_is_told(book: Book) -> None:
    short, long = scope("short", concurrency=1), scope("long", requests_per_minute=1)
    assert book.reserve(reservation(short, long)).refusal is None
    refusal = book.reserve(reservation(short, long)).refusal
    assert refusal is not None
    assert (refusal.limit, refusal.retry_after_s) == (Limit.REQUESTS_PER_MINUTE, 60.0)


def test_given_up_reservation_is_taken_to_be_used(book: Book) -> None:
    one = scope(tokens_per_day=100, tokens_per_minute=100)
    lost = reservation(one, tokens=70)
    book.reserve(lost)
    book.clock.now_s += RENEWAL_TIMEOUT_S + 1
    book.sweep()
    assert book.held("u") == 0
    assert left(book, one, Limit.TOKENS_PER_DAY) == 30
    # Its gateway was only away, and tells what it did use.
    book.settle(settlement(lost, tokens=20))
    assert left(book, one, Limit.TOKENS_PER_DAY) == 80
    assert left(book, one, Limit.TOKENS_PER_MINUTE) == 80


def test_given_up_reservation_that_still_runs_is_held_again(book: Book) -> None:
    one = scope(tokens_per_day=100)
    slow = reservation(one, tokens=70)
    book.reserve(slow)
    book.clock.now_s += RENEWAL_TIMEOUT_S + 1
    book.sweep()
    book.hold(slow.id, tokens=70)
    assert book.held("u") == 1
    assert left(book, one, Limit.TOKENS_PER_DAY) == 30
    book.settle(settlement(slow, tokens=10))
    assert left(book, one, Limit.TOKENS_PER_DAY) == 90
