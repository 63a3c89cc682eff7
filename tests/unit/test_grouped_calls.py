"""Calls that are made together: who goes with whom, and what becomes of each."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from serve_app import grouped_calls
from serve_app.errors import LogUnavailable
from serve_app.grouped_calls import GroupedCalls


class Elsewhere:
    """Doubles numbers, each call when it is let."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.ends: list[asyncio.Future[None]] = []

    async def call(self, asked: Sequence[int]) -> list[int]:
        self.calls.append(list(asked))
        self.ends.append(asyncio.get_running_loop().create_future())
        await self.ends[-1]
        return [2 * number for number in asked]


@pytest.fixture
def elsewhere() -> Elsewhere:
    return Elsewhere()


@pytest.fixture
async def grouped(elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch) -> GroupedCalls[int, int]:
    monkeypatch.setattr(grouped_calls, "_PATIENCE_S", 60.0)
    return GroupedCalls(elsewhere.call, most=3)


async def _settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def _ask(grouped: GroupedCalls[int, int], *numbers: int) -> list[asyncio.Task[int]]:
    return [asyncio.create_task(grouped.ask(number)) for number in numbers]


async def test_who_comes_during_a_call_goes_with_the_next(
    elsewhere: Elsewhere, grouped: GroupedCalls[int, int]
) -> None:
    first = _ask(grouped, 1)
    await _settled()
    rest = _ask(grouped, 2, 3, 4, 5)
    await _settled()
    assert elsewhere.calls == [[1]]
    for number in range(3):
        elsewhere.ends[number].set_result(None)
        await _settled()
    assert elsewhere.calls == [[1], [2, 3, 4], [5]]
    assert await asyncio.gather(*first, *rest) == [2, 4, 6, 8, 10]


async def test_call_that_takes_long_keeps_nobody_back(
    elsewhere: Elsewhere, grouped: GroupedCalls[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped_calls, "_PATIENCE_S", 0.0)
    stuck = _ask(grouped, 1)
    await _settled()
    (other,) = _ask(grouped, 2)
    async with asyncio.timeout(10):
        while len(elsewhere.ends) < 2:  # noqa: ASYNC110 - of whatever state
            await asyncio.sleep(0)
    elsewhere.ends[1].set_result(None)
    assert await other == 4
    assert not stuck[0].done()
    elsewhere.ends[0].set_result(None)
    assert await stuck[0] == 2


async def test_who_leaves_before_the_call_is_not_asked_for(
    elsewhere: Elsewhere, grouped: GroupedCalls[int, int]
) -> None:
    first = _ask(grouped, 1)
    await _settled()
    left, stays = _ask(grouped, 2, 3)
    await _settled()
    left.cancel()
    elsewhere.ends[0].set_result(None)
    await _settled()
    assert elsewhere.calls == [[1], [3]]
    elsewhere.ends[1].set_result(None)
    assert await asyncio.gather(*first, stays) == [2, 6]


async def test_who_leaves_during_the_call_takes_nobody_along(
    elsewhere: Elsewhere, grouped: GroupedCalls[int, int]
) -> None:
    left, stays = _ask(grouped, 1, 2)
    await _settled()
    left.cancel()
    await _settled()
    elsewhere.ends[0].set_result(None)
    assert await stays == 4
    assert left.cancelled()


async def test_failure_reaches_all_of_its_call_and_no_other(
    elsewhere: Elsewhere, grouped: GroupedCalls[int, int]
) -> None:
    failed = _ask(grouped, 1, 2)
    await _settled()
    later = _ask(grouped, 3)
    await _settled()
    elsewhere.ends[0].set_exception(LogUnavailable())
    await _settled()
    elsewhere.ends[1].set_result(None)
    assert await later[0] == 6
    results = await asyncio.gather(*failed, return_exceptions=True)
    assert [type(result) for result in results] == [LogUnavailable] * 2
