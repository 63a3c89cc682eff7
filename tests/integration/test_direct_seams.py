"""Gateways call limits and request log directly, and through Ray where they cannot."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, cast

import pytest
from ray.serve.handle import DeploymentHandle

from deployments.seams import RayLimitKeeper, RayRecordSink
from serve_app.accounts.procedures import log_handlers
from serve_app.contracts import Allowance, Reservation, Scope, Settlement, Spent
from serve_app.direct import DirectServer, Door, Handler
from serve_app.errors import HandedOver, LimitsUnavailable
from serve_app.limits.book import LimitBook
from serve_app.limits.procedures import limit_handlers
from serve_app.records import Outcome, RequestRecord, new_id, utc_now

SCOPE = Scope(key="u", label="you", concurrency=2, tokens_per_day=100)


class Method:
    """A method of a handle, which counts who comes through Ray."""

    def __init__(self, work: Callable[..., Awaitable[Any]]) -> None:
        self._work = work
        self.calls = 0

    def remote(self, *args: Any) -> Awaitable[Any]:
        self.calls += 1
        return self._work(*args)


class Replica:
    """A deployment of one replica, with a door for direct calls."""

    def __init__(self, handlers: dict[int, Handler]) -> None:
        self._handlers = handlers
        self._server: DirectServer | None = None
        self._door: Door | None = None
        self.door = Method(self._tell_door)

    async def open(self) -> None:
        self._server = DirectServer(self._handlers, "127.0.0.1")
        self._door = await self._server.start()

    async def close(self) -> None:
        self._door = None
        if self._server is not None:
            await self._server.close()

    async def _tell_door(self) -> Door:
        if self._door is None:
            raise HandedOver  # as `Direct.door` does, and Serve brings it over gRPC
        return self._door

    @property
    def handle(self) -> DeploymentHandle:
        return cast(DeploymentHandle, self)


class Limits(Replica):
    """The limits, by a book in memory."""

    def __init__(self) -> None:
        super().__init__(limit_handlers(self._reserve_all, self._settle_all))
        self.book = LimitBook(lambda: 1000.0, lambda: 1000.0)
        self.unknown = False
        self.reserve_all = Method(self._reserve_all)
        self.settle_all = Method(self._settle_all)
        self.renew = Method(self._renew)

    async def _reserve_all(
        self, reservations: Sequence[Reservation]
    ) -> list[Allowance | LimitsUnavailable]:
        if self.unknown:
            return [LimitsUnavailable(retry_after_s=5) for _ in reservations]
        return [self.book.reserve(one) for one in reservations]

    async def _settle_all(self, settlements: Sequence[Settlement]) -> None:
        for one in settlements:
            self.book.settle(one)

    async def _renew(self, held: Sequence[uuid.UUID]) -> list[uuid.UUID]:
        return self.book.renew(held)

    def left(self) -> list[int]:
        return [state.window.remaining for state in self.book.standing([SCOPE])]


class Log(Replica):
    """A request log in memory, with room for three."""

    def __init__(self) -> None:
        super().__init__(log_handlers(self._append_all))
        self.records: list[RequestRecord] = []
        self.append_all = Method(self._append_all)

    async def _append_all(self, records: Sequence[RequestRecord]) -> list[bool]:
        self.records += records
        return [True] * len(records)

    def broadcast(self, _method: str) -> Log:
        return self

    async def results_async(self, **_options: Any) -> list[bool]:
        return [True]


@pytest.fixture
async def limits() -> AsyncIterator[Limits]:
    limits = Limits()
    await limits.open()
    yield limits
    await limits.close()


@pytest.fixture
async def keeper(limits: Limits) -> AsyncIterator[RayLimitKeeper]:
    keeper = RayLimitKeeper(limits.handle)
    keeper.start()
    await once_direct(limits.reserve_all, lambda: keeper.reserve(reservation(0)))
    limits.book = LimitBook(lambda: 1000.0, lambda: 1000.0)
    yield keeper
    await keeper.close()


async def once_direct(through_ray: Method, call: Callable[[], Awaitable[Any]]) -> None:
    """Call until a call does not go through Ray."""
    async with asyncio.timeout(20):
        while True:
            through_ray.calls = 0
            await call()
            if through_ray.calls == 0:
                return
            await asyncio.sleep(0.01)


def reservation(tokens: int) -> Reservation:
    return Reservation(id=uuid.uuid4(), scopes=(SCOPE,), most=Spent(tokens=tokens))


async def test_limits_are_asked_and_told_without_ray(
    limits: Limits, keeper: RayLimitKeeper
) -> None:
    one, other, third = reservation(30), reservation(20), reservation(1)
    allowances = await asyncio.gather(*(keeper.reserve(r) for r in (one, other, third)))
    assert [a.refusal is None for a in allowances] == [True, True, False]
    assert limits.left() == [0, 50]
    await keeper.settle(one, Spent(tokens=10))
    assert limits.left() == [1, 70]
    assert (limits.reserve_all.calls, limits.settle_all.calls) == (0, 0)


async def test_limits_that_do_not_know_say_so_directly_too(
    limits: Limits, keeper: RayLimitKeeper
) -> None:
    limits.unknown = True
    with pytest.raises(LimitsUnavailable) as raised:
        await keeper.reserve(reservation(1))
    assert raised.value.retry_after_s == 5
    assert limits.reserve_all.calls == 0


async def test_limits_are_asked_through_ray_while_their_door_is_closed(
    limits: Limits, keeper: RayLimitKeeper
) -> None:
    await limits.close()
    one = reservation(30)
    assert (await keeper.reserve(one)).refusal is None
    await keeper.settle(one, Spent(tokens=10))
    assert limits.left() == [2, 90]
    assert (limits.reserve_all.calls, limits.settle_all.calls) == (1, 1)
    await limits.open()
    await once_direct(limits.reserve_all, lambda: keeper.reserve(reservation(0)))


async def test_records_go_to_the_log_without_ray_and_arrive_whole() -> None:
    log = Log()
    await log.open()
    sink = RayRecordSink(log.handle)
    sink.start()
    await once_direct(log.append_all, lambda: sink.append(record("first")))
    log.records.clear()
    full = record("ünï" * 100_000)
    await asyncio.gather(sink.append(full), *(sink.append(record("")) for _ in range(40)))
    assert log.append_all.calls == 0
    assert len(log.records) == 41
    assert full in log.records
    await log.close()
    await sink.append(record("through Ray"))
    assert log.records[-1].request_body == "through Ray"
    assert log.append_all.calls == 1
    await sink.close()


def record(text: str) -> RequestRecord:
    return RequestRecord(
        id=new_id(),
        request_id="r",
        created_at=utc_now(),
        route="chat.completions",
        status=200,
        outcome=Outcome.COMPLETED,
        api_key_id=uuid.uuid4(),
        duration_ms=1.5,
        request_body=text,
    )
