"""How a gateway keeps the Limits deployment told, whatever is lost on the way."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from ray.exceptions import RayActorError

from deployments.seams.limits import RayLimitKeeper
from serve_app.contracts import Allowance, LimitState, Reservation, Scope, Settlement, Spent
from serve_app.errors import LimitsUnavailable
from serve_app.limits.book import LimitBook

SCOPE = Scope(key="u", label="you", concurrency=2, tokens_per_day=100)


class Method:
    """One method of a handle."""

    def __init__(self, call: Callable[..., Awaitable[Any]]) -> None:
        self._call = call

    def remote(self, *args: Any) -> Awaitable[Any]:
        return self._call(*args)


class Handle:
    """The Limits deployment, which can be away; a new one knows nothing."""

    def __init__(self) -> None:
        self.book = LimitBook(lambda: 1000.0, lambda: 1000.0)
        self.away = False
        self.reserve = Method(self._reserve)
        self.settle = Method(self._settle)
        self.renew = Method(self._renew)
        self.adopt = Method(self._adopt)
        self.standing = Method(self._standing)

    def _here(self) -> LimitBook:
        if self.away:
            raise RayActorError
        return self.book

    async def _reserve(self, reservation: Reservation) -> Allowance:
        return self._here().reserve(reservation)

    async def _settle(self, settlement: Settlement) -> None:
        self._here().settle(settlement)

    async def _renew(self, held: Sequence[uuid.UUID]) -> list[uuid.UUID]:
        return self._here().renew(held)

    async def _adopt(self, held: Sequence[Settlement]) -> None:
        for one in held:
            self._here().adopt(one.id, one.accounts, one.spent)

    async def _standing(self, scopes: Sequence[Scope]) -> list[LimitState]:
        return self._here().standing(scopes)

    def left(self) -> list[int]:
        return [state.window.remaining for state in self.book.standing([SCOPE])]


@pytest.fixture
def handle() -> Handle:
    return Handle()


@pytest.fixture
def keeper(handle: Handle) -> RayLimitKeeper:
    return RayLimitKeeper(handle)


def reservation(tokens: int = 30) -> Reservation:
    return Reservation(id=uuid.uuid4(), scopes=(SCOPE,), most=Spent(tokens=tokens))


async def test_settle_that_is_lost_is_told_again(handle: Handle, keeper: RayLimitKeeper) -> None:
    one = reservation()
    await keeper.reserve(one)
    handle.away = True
    await keeper.settle(one, Spent(tokens=10))
    handle.away = False
    assert handle.left() == [1, 70]
    await keeper._tell()
    assert handle.left() == [2, 90]
    await keeper._tell()
    assert handle.left() == [2, 90]


async def test_new_book_is_told_what_is_under_way(handle: Handle, keeper: RayLimitKeeper) -> None:
    running, done = reservation(), reservation()
    for one in (running, done):
        await keeper.reserve(one)
    await keeper.settle(done, Spent(tokens=30))
    handle.book = LimitBook(lambda: 1000.0, lambda: 1000.0)
    await keeper._tell()
    assert handle.left() == [1, 70]
    await keeper.settle(running, Spent(tokens=5))
    assert handle.left() == [2, 95]


async def test_what_was_refused_is_not_held(handle: Handle, keeper: RayLimitKeeper) -> None:
    refused = reservation(101)
    assert (await keeper.reserve(refused)).refusal is not None
    await keeper.settle(refused, Spent())
    await keeper._tell()
    assert handle.left() == [2, 100]


async def test_standing_takes_nothing(handle: Handle, keeper: RayLimitKeeper) -> None:
    for _ in range(2):
        states = await keeper.standing([SCOPE])
        assert [state.window.remaining for state in states] == [2, 100]


async def test_replica_that_stays_away_is_unavailable(
    handle: Handle, keeper: RayLimitKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.seams.limits._RESERVE_TIMEOUT_S", 0.1)
    handle.away = True
    with pytest.raises(LimitsUnavailable):
        await keeper.reserve(reservation())
