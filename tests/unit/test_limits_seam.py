"""How a gateway keeps the Limits deployment told, whatever is lost on the way."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayTaskError

from deployments.seams.calls import CallsBroken
from deployments.seams.limits import RayLimitKeeper
from serve_app.contracts import Allowance, LimitState, Reservation, Scope, Settlement, Spent
from serve_app.direct import Door
from serve_app.errors import HandedOver, LimitsUnavailable
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
        # So many calls more come to a replica that has handed over, and get this.
        self.too_late = 0
        self.error: Exception = HandedOver()
        # Reservations of so many tokens cannot be judged.
        self.unknown: set[int] = set()
        self.calls: list[int] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.reserve_all = Method(self._reserve_all)
        self.settle_all = Method(self._settle_all)
        self.renew = Method(self._renew)
        self.adopt = Method(self._adopt)
        self.standing = Method(self._standing)
        self.door = Method(self._door)

    def _here(self) -> LimitBook:
        if self.away:
            raise RayActorError
        if self.too_late:
            self.too_late -= 1
            raise self.error
        return self.book

    async def _reserve_all(
        self, reservations: Sequence[Reservation]
    ) -> list[Allowance | LimitsUnavailable]:
        self.calls.append(len(reservations))
        await self.gate.wait()
        return [self._reserved(one) for one in reservations]

    def _reserved(self, reservation: Reservation) -> Allowance | LimitsUnavailable:
        if reservation.most.tokens in self.unknown:
            return LimitsUnavailable(retry_after_s=5)
        return self._here().reserve(reservation)

    async def _settle_all(self, settlements: Sequence[Settlement]) -> None:
        for one in settlements:
            self._here().settle(one)

    async def _renew(self, held: Sequence[uuid.UUID]) -> list[uuid.UUID]:
        return self._here().renew(held)

    async def _adopt(self, held: Sequence[Settlement]) -> None:
        for one in held:
            self._here().adopt(one.id, one.accounts, one.spent)

    async def _standing(self, scopes: Sequence[Scope]) -> list[LimitState]:
        return self._here().standing(scopes)

    async def _door(self) -> Door:
        raise HandedOver

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


# What was raised over there comes as it was over gRPC, and else as Ray's copy.
@pytest.mark.parametrize("copied", [False, True])
async def test_replica_that_has_handed_over_is_not_the_last_word(
    copied: bool, handle: Handle, keeper: RayLimitKeeper
) -> None:
    if copied:
        copy = RayTaskError("reserve_all", "traceback", HandedOver())
        handle.error = copy.as_instanceof_cause()
    one = reservation()
    handle.too_late = 2
    assert (await keeper.reserve(one)).refusal is None
    handle.too_late = 1
    assert await keeper.works()
    handle.too_late = 1
    assert len(await keeper.standing([SCOPE])) == 2
    handle.too_late = 1
    await keeper.settle(one, Spent(tokens=10))
    assert handle.left() == [1, 70]
    await keeper._tell()
    assert handle.left() == [2, 90]


@pytest.mark.parametrize(
    "error", [HandedOver(), LimitsUnavailable(), ValueError(), RayActorError(), TimeoutError()]
)
async def test_telling_goes_on_whatever_comes_back(
    error: Exception, handle: Handle, keeper: RayLimitKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.seams.limits._RENEW_EVERY_S", 0.01)
    one = reservation()
    await keeper.reserve(one)
    handle.error, handle.too_late = error, 3
    keeper.start()
    await keeper.settle(one, Spent(tokens=10))
    async with asyncio.timeout(10):
        while handle.left() != [2, 90]:  # noqa: ASYNC110  told by a task that says nothing
            await asyncio.sleep(0.01)
    assert handle.too_late == 0
    keeper.check()
    await keeper.close()


async def test_keeper_that_tells_nothing_more_is_broken(keeper: RayLimitKeeper) -> None:
    keeper.check()
    keeper.start()
    keeper.check()
    await keeper.close()
    with pytest.raises(CallsBroken, match="told of nothing more"):
        keeper.check()


async def test_works_only_where_it_answers(
    handle: Handle, keeper: RayLimitKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.seams.limits._WORKS_TIMEOUT_S", 0.1)
    assert await keeper.works()
    handle.away = True
    assert not await keeper.works()


async def test_one_that_cannot_be_judged_fails_alone(
    handle: Handle, keeper: RayLimitKeeper
) -> None:
    handle.unknown = {7}
    handle.gate.clear()
    asked = [asyncio.create_task(keeper.reserve(reservation(n))) for n in (30, 7, 31)]
    await asyncio.sleep(0)
    handle.gate.set()
    granted, failed, also = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(failed, LimitsUnavailable)
    assert (granted.refusal, also.refusal) == (None, None)
    await keeper._tell()
    assert handle.left() == [0, 39]
