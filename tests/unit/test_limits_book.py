"""The counters of the limits, with a clock that the test moves."""

from __future__ import annotations

import math
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.config import LimitPolicy
from serve_app.contracts import Refusal, ReservationRequest, Window
from serve_app.limits.book import WINDOW_S, LimitBook
from serve_app.limits.headers import duration_text

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
        super().__init__(self.clock, renewal_timeout_s=RENEWAL_TIMEOUT_S)

    def take(
        self,
        policy: LimitPolicy,
        reservation_id: uuid.UUID | None = None,
        *,
        principal: str = "u",
    ) -> Refusal | None:
        """Reserve."""
        return self.reserve(
            ReservationRequest(
                id=reservation_id or uuid.uuid4(),
                principal_id=principal,
                policy=policy,
            )
        ).refusal


@pytest.fixture
def book() -> Book:
    return Book()


ONE_AT_ONCE = LimitPolicy(concurrency=1)
NO_LIMIT = LimitPolicy()


# Requests a minute. Steps are multiples of 1/8 s, so that the arithmetic is exact.


@given(
    allowed=st.integers(1, 5),
    steps=st.lists(st.integers(0, 30 * 8).map(lambda eighths: eighths / 8), max_size=60),
)
def test_window_is_exact(allowed: int, steps: list[float]) -> None:
    book, policy = Book(), LimitPolicy(requests_per_minute=allowed)
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
    book, policy = Book(), LimitPolicy(requests_per_minute=2)
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
        assert book.take(LimitPolicy(requests_per_minute=5)) is None
        book.clock.now_s += 1
    refusal = book.take(LimitPolicy(requests_per_minute=2))
    # Four of the five must leave the window: the fourth came two seconds ago.
    assert refusal is not None
    assert refusal.retry_after_s == WINDOW_S - 2


def test_refused_request_takes_nothing(book: Book) -> None:
    policy = LimitPolicy(requests_per_minute=1)
    assert book.take(policy) is None
    for _ in range(100):
        book.clock.now_s += WINDOW_S / 101
        assert book.take(policy) is not None
    book.clock.now_s = 1000 + WINDOW_S
    assert book.take(policy) is None


def test_settled_request_stays_in_the_window(book: Book) -> None:
    one = uuid.uuid4()
    assert book.take(LimitPolicy(requests_per_minute=1), one) is None
    book.settle(one)
    assert book.take(LimitPolicy(requests_per_minute=1)) is not None


def test_principals_have_windows_of_their_own(book: Book) -> None:
    policy = LimitPolicy(requests_per_minute=1)
    assert book.take(policy, principal="a") is None
    assert book.take(policy, principal="b") is None


def test_error_names_the_limit_and_the_time() -> None:
    error = Refusal(limit="requests per minute", allowed=10, retry_after_s=12.3).error()
    assert error.message == ("The limit of 10 requests per minute is reached. Try again in 13 s.")
    assert error.retry_after_s is not None
    assert math.ceil(error.retry_after_s) == 13


# Concurrency.


def test_concurrency(book: Book) -> None:
    policy = LimitPolicy(concurrency=2)
    first, second = uuid.uuid4(), uuid.uuid4()
    assert book.take(policy, first) is None
    assert book.take(policy, second) is None
    refusal = book.take(policy)
    assert refusal is not None
    assert (refusal.limit, refusal.allowed) == ("concurrent requests", 2)
    assert refusal.retry_after_s > 0
    book.settle(first)
    assert book.take(policy) is None
    assert book.take(policy) is not None


def test_refused_concurrency_leaves_no_stamp_in_the_window(book: Book) -> None:
    first = uuid.uuid4()
    policy = LimitPolicy(concurrency=1, requests_per_minute=2)
    assert book.take(policy, first) is None
    assert book.take(policy) is not None
    book.settle(first)
    assert book.take(policy) is None


def test_repeated_id_is_granted_once(book: Book) -> None:
    policy = LimitPolicy(concurrency=1, requests_per_minute=1)
    one = uuid.uuid4()
    assert [book.take(policy, one) for _ in range(3)] == [None] * 3
    assert book.held("u") == 1
    book.settle(one)
    assert book.held("u") == 0


def test_settle_that_overtakes_its_reserve_leaves_nothing_held(book: Book) -> None:
    one = uuid.uuid4()
    book.settle(one)
    assert book.take(ONE_AT_ONCE, one) is None
    assert book.held("u") == 0
    assert book.take(ONE_AT_ONCE) is None


def test_settling_twice_gives_back_once(book: Book) -> None:
    policy = LimitPolicy(concurrency=2)
    first = uuid.uuid4()
    for one in (first, uuid.uuid4()):
        assert book.take(policy, one) is None
    book.settle(first)
    book.settle(first)
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
        book.renew([(one, "u")])
        assert book.take(ONE_AT_ONCE) is not None


def test_reservation_that_its_holder_no_longer_renews_ends(book: Book) -> None:
    # Its settle was lost on the way, and the holder lives on.
    lost, kept = uuid.uuid4(), uuid.uuid4()
    for one in (lost, kept):
        assert book.take(NO_LIMIT, one) is None
    for _ in range(4):
        book.clock.now_s += RENEWAL_TIMEOUT_S / 3
        book.renew([(kept, "u")])
        book.sweep()
    assert book.held("u") == 1


def test_reservation_that_is_younger_than_the_list_is_kept(book: Book) -> None:
    # The list was made before the reservation was granted.
    assert book.take(ONE_AT_ONCE) is None
    book.renew([])
    assert book.held("u") == 1


def test_renew_adopts_what_a_new_book_does_not_know(book: Book) -> None:
    one = uuid.uuid4()
    book.renew([(one, "u")])
    assert book.held("u") == 1
    assert book.take(ONE_AT_ONCE) is not None
    book.settle(one)
    assert book.take(ONE_AT_ONCE) is None


def test_renew_does_not_bring_back_what_was_settled(book: Book) -> None:
    one = uuid.uuid4()
    assert book.take(ONE_AT_ONCE, one) is None
    book.settle(one)
    book.renew([(one, "u")])
    assert book.held("u") == 0


# Memory.


def test_sweep_forgets_the_idle(book: Book) -> None:
    for number in range(100):
        one = uuid.uuid4()
        assert book.take(LimitPolicy(requests_per_minute=9), one, principal=str(number)) is None
        book.settle(one)
    book.clock.now_s += WINDOW_S
    book.sweep()
    assert not book._accounts
    assert not book._settled_s
    assert not book._owner


def test_a_window_holds_no_more_stamps_than_the_limit(book: Book) -> None:
    for _ in range(50):
        book.clock.now_s += WINDOW_S / 10
        book.take(LimitPolicy(requests_per_minute=3))
    assert len(book._accounts["u"].granted_s) <= 3


# What is told of the limits.


def test_allowance_tells_what_is_left(book: Book) -> None:
    policy = LimitPolicy(requests_per_minute=2)

    def told() -> Window | None:
        request = ReservationRequest(id=uuid.uuid4(), principal_id="u", policy=policy)
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
    request = ReservationRequest(id=uuid.uuid4(), principal_id="u", policy=NO_LIMIT)
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
    book.settle(earlier)
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
        book.settle(one)
    book.take(ONE_AT_ONCE)
    busy = book.take(ONE_AT_ONCE)
    assert busy is not None
    assert busy.retry_after_s == pytest.approx(12.0)


def test_settle_that_comes_twice_counts_once(book: Book) -> None:
    one = uuid.uuid4()
    book.take(ONE_AT_ONCE, one)
    book.clock.now_s += 4
    book.settle(one)
    book.clock.now_s += 4
    book.settle(one)
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
