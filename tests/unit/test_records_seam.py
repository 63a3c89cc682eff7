"""How a gateway finds a request log that takes its record."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Sequence
from typing import Any

import pytest
from ray.exceptions import RayActorError

from deployments.seams import records
from deployments.seams.records import RayRecordSink
from serve_app.errors import LogUnavailable
from serve_app.records import Outcome, RequestRecord, new_id, utc_now


def _record() -> RequestRecord:
    return RequestRecord(
        id=new_id(),
        request_id="r",
        created_at=utc_now(),
        route="x",
        status=200,
        outcome=Outcome.COMPLETED,
    )


class Replica:
    """A replica of the log. `error` is what it says to an append; `hangs` says nothing."""

    def __init__(
        self, error: Exception | None = None, *, hangs: bool = False, room: bool = True
    ) -> None:
        self.error = error
        self.room = room
        self.hangs = hangs
        self.records: list[RequestRecord] = []
        self.refused: set[uuid.UUID] = set()

    async def append(self, record: RequestRecord) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        if record.id in self.refused:
            raise LogUnavailable
        self.records.append(record)

    async def append_all(self, records: Sequence[RequestRecord]) -> list[bool]:
        return [await self._took(record) for record in records]

    async def _took(self, record: RequestRecord) -> bool:
        try:
            await self.append(record)
        except LogUnavailable:
            return False
        return True

    async def has_room(self) -> bool:
        if isinstance(self.error, RayActorError):
            raise self.error
        return self.room


class Broadcast:
    """The answers of all replicas."""

    def __init__(self, answers: Sequence[Awaitable[Any]]) -> None:
        self._answers = answers

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        async with asyncio.timeout(timeout_s):
            return await asyncio.gather(*self._answers, return_exceptions=return_exceptions)


class Handle:
    """The deployment. Ray's choice falls on `chosen`, in turn; the last stays."""

    def __init__(self, *replicas: Replica, chosen: Sequence[int] = (0,)) -> None:
        self.replicas = replicas
        self._chosen = list(chosen)
        self.append_all = self

    def remote(self, records: Sequence[RequestRecord]) -> Awaitable[list[bool]]:
        index = self._chosen.pop(0) if len(self._chosen) > 1 else self._chosen[0]
        return self.replicas[index].append_all(records)

    def broadcast(self, method: str, *args: Any) -> Broadcast:
        return Broadcast([getattr(replica, method)(*args) for replica in self.replicas])


def _sink(handle: Handle) -> RayRecordSink:
    return RayRecordSink(handle)  # type: ignore[arg-type]


async def test_one_takes_it_and_no_other_is_asked() -> None:
    handle = Handle(Replica(), Replica())
    await _sink(handle).append(_record())
    assert [len(replica.records) for replica in handle.replicas] == [1, 0]


async def test_where_one_refuses_another_takes_it() -> None:
    # Ray chooses the one that refuses every time: it is never busy.
    handle = Handle(Replica(LogUnavailable()), Replica(RayActorError()), Replica())
    await _sink(handle).append(record := _record())
    assert handle.replicas[2].records == [record]


async def test_where_one_is_lost_another_is_asked() -> None:
    handle = Handle(Replica(RayActorError()), Replica(), chosen=(0, 1))
    await _sink(handle).append(record := _record())
    assert handle.replicas[1].records == [record]


async def test_where_one_hangs_another_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_PATIENCE_FIRST_S", 0.01)
    handle = Handle(Replica(hangs=True), Replica(), chosen=(0, 1))
    await _sink(handle).append(record := _record())
    assert handle.replicas[1].records == [record]


async def test_where_all_refuse_it_is_not_safe() -> None:
    handle = Handle(Replica(LogUnavailable()), Replica(LogUnavailable()))
    with pytest.raises(LogUnavailable):
        await _sink(handle).append(_record())


async def test_record_that_is_refused_goes_elsewhere_alone() -> None:
    handle = Handle(Replica(), Replica())
    good, bad, also = (_record() for _ in range(3))
    handle.replicas[0].refused = {bad.id}
    sink = _sink(handle)
    await asyncio.gather(*(sink.append(record) for record in (good, bad, also)))
    assert [record.id for record in handle.replicas[0].records] == [good.id, also.id]
    assert [record.id for record in handle.replicas[1].records] == [bad.id]


@pytest.mark.parametrize(
    ("replicas", "full", "answers"),
    [
        ([Replica()], False, True),
        ([Replica(room=False)], True, True),
        ([Replica(room=False), Replica()], False, True),
        ([Replica(room=False), Replica(RayActorError())], True, True),
        # Nothing is known.
        ([Replica(RayActorError())], False, False),
    ],
)
async def test_the_log_is_full_where_no_replica_that_answers_has_room(
    monkeypatch: pytest.MonkeyPatch, replicas: list[Replica], full: bool, answers: bool
) -> None:
    monkeypatch.setattr(records, "_WATCH_EVERY_S", 0)
    sink = _sink(Handle(*replicas))
    sink.start()
    for _ in range(20):
        await asyncio.sleep(0)
    assert sink.full is full
    assert await sink.works(room=True) is (answers and not full)
    assert await sink.works(room=False) is answers
    for replica in replicas:
        replica.room, replica.error = True, None
    for _ in range(20):
        await asyncio.sleep(0)
    assert not sink.full
    await sink.close()
