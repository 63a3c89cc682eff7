"""A lease serves one request after the other: what a client sees of it, and what is left."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from serve_app.fake_engine import FakeEngineConfig
from serve_app.records import Outcome
from tests.integration.fakes import World, client, until, world

TEXT = "/v1/completions"
SLOW = FakeEngineConfig(time_to_first_token_s=0, time_per_token_s=0.01)


def body(**more: Any) -> dict[str, Any]:
    """Return a request."""
    return {"model": "small", "prompt": "one two three", "max_tokens": 5, **more}


async def answered(http: httpx.AsyncClient, **more: Any) -> str:
    response = await http.post(TEXT, json=body(**more))
    assert response.status_code == 200, response.text
    return response.text


async def nothing_is_kept(served: World) -> None:
    """Check that no lease is left, long before it would have ended by its time."""
    async with asyncio.timeout(0.5):
        while any(len(replica.leases) for replica in served.replicas):  # noqa: ASYNC110
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("stream", [True, False])
async def test_requests_one_after_the_other_need_one_lease(stream: bool) -> None:
    async with world() as served, client(served) as http:
        served.pool.may_keep = 4
        texts = [await answered(http, stream=stream) for _ in range(5)]
        assert all("w4" in text for text in texts)
        assert len(served.pool.hints) == 1
        assert served.replica.counters.resting_leases == 1
        # It ends by its time, though nobody does anything.
        await served.quiet(5)
        assert {record.outcome for record in served.records} == {Outcome.COMPLETED}
        served.assert_accounts_add_up()


async def test_many_at_once_share_what_is_kept() -> None:
    async with world(queue={"at_ray": 4}) as served, client(served) as http:
        served.pool.may_keep, served.pool.capacity = 4, 4
        await asyncio.gather(*(answered(http, stream=n % 2 == 0) for n in range(40)))
        assert len(served.pool.hints) < 20
        await served.quiet(40)
        served.assert_accounts_add_up()


async def test_replica_that_allows_none_is_asked_for_each() -> None:
    async with world() as served, client(served) as http:
        await answered(http)
        await answered(http)
        assert len(served.pool.hints) == 2


async def test_lease_of_a_client_that_left_is_closed() -> None:
    async with world(SLOW) as served, client(served) as http:
        served.pool.may_keep = 4
        asking = asyncio.create_task(http.post(TEXT, json=body(max_tokens=2000, stream=True)))
        await until(lambda: served.replica.counters.completion_tokens > 0)
        asking.cancel()
        await asyncio.wait([asking])
        await until(lambda: len(served.records) == 1)
        await nothing_is_kept(served)
        row = await served.the_record()
        assert (row.outcome, row.finish_reason) == (Outcome.CANCELLED, "abort")
        served.assert_accounts_add_up()


@pytest.mark.parametrize(
    ("prompt", "status"),
    [("[[error=400]]", 400), ("[[error=500]]", 502), ("[[drop_after=2]]", 502)],
)
async def test_lease_of_a_request_that_failed_is_closed(prompt: str, status: int) -> None:
    async with world() as served, client(served) as http:
        served.pool.may_keep = 4
        response = await http.post(TEXT, json=body(prompt=prompt))
        assert response.status_code == status
        await nothing_is_kept(served)


async def test_lease_of_a_request_that_timed_out_is_closed() -> None:
    async with world(deadline_s=0.3) as served, client(served) as http:
        served.pool.may_keep = 4
        response = await http.post(TEXT, json=body(prompt="[[stall_after=1]]", stream=True))
        assert "deadline" in response.text
        await nothing_is_kept(served)
        assert (await served.the_record()).outcome is Outcome.TIMED_OUT


async def test_replica_that_failed_loses_what_was_kept_of_it() -> None:
    async with world() as served, client(served) as http:
        served.pool.may_keep = 4
        served.replica.gate.shut()
        asking = [asyncio.create_task(answered(http)) for _ in range(3)]
        await until(lambda: served.replica.gate.waiting == 3)
        served.replica.gate.open()
        await asyncio.gather(*asking)
        assert served.replica.counters.resting_leases == 3
        await http.post(TEXT, json=body(prompt="[[error=500]]"))
        await nothing_is_kept(served)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("replicas", [1, 2])
async def test_lease_that_ended_at_the_replica_costs_nobody_an_answer(
    stream: bool, replicas: int
) -> None:
    async with world(replicas=replicas) as served, client(served) as http:
        served.pool.may_keep = 4
        await answered(http)
        served.pool.lose_leases()
        await nothing_is_kept(served)
        assert "w4" in await answered(http, stream=stream)
        # It was no failure of a replica, which would have to be avoided then.
        assert [hint.avoid for hint in served.pool.hints] == [None, None]
        await served.quiet(2)
        assert served.records[-1].outcome is Outcome.COMPLETED
        served.assert_accounts_add_up()


async def test_after_a_lease_that_was_gone_the_request_meets_no_other() -> None:
    async with world(replicas=2) as served, client(served) as http:
        served.pool.may_keep = 4
        for replica in served.replicas:
            replica.gate.shut()
        asking = [asyncio.create_task(answered(http)) for _ in range(4)]
        await until(lambda: sum(replica.gate.waiting for replica in served.replicas) == 4)
        for replica in served.replicas:
            replica.gate.open()
        await asyncio.gather(*asking)
        served.pool.lose_leases()
        await nothing_is_kept(served)
        await answered(http)
        assert len(served.pool.hints) == 5


async def test_replica_that_died_is_followed_by_one_that_lives() -> None:
    """The lease is gone, and Ray has not seen yet that its replica is, too."""
    async with world(replicas=2) as served, client(served) as http:
        served.pool.may_keep = 4
        await answered(http)
        served.pool.lose_leases()
        await served.replica.server.stop()
        assert "w4" in await answered(http, stream=True)
        await served.quiet(2)
        row = served.records[-1]
        assert (row.outcome, row.replica_id) == (Outcome.COMPLETED, "replica-2")
        assert [hint.avoid for hint in served.pool.hints][:3] == [None, None, "replica-1"]


async def test_client_that_goes_away_while_a_lost_lease_is_replaced() -> None:
    async with world() as served, client(served) as http:
        served.pool.may_keep = 4
        await answered(http)
        served.pool.lose_leases()
        await nothing_is_kept(served)
        served.pool.gate.shut()
        asking = asyncio.create_task(http.post(TEXT, json=body(stream=True)))
        await served.pool.gate.reached()
        asking.cancel()
        await asyncio.wait([asking])
        await served.quiet(2)
        assert served.records[-1].outcome is Outcome.CANCELLED


async def test_answer_that_nobody_takes_any_more_leaves_its_lease_to_the_next() -> None:
    async with world() as served, client(served) as http:
        served.pool.may_keep = 4
        served.log.gate.shut()
        asking = asyncio.create_task(http.post(TEXT, json=body(stream=True)))
        await served.log.gate.reached()
        # It is free again before the record is safe.
        assert served.replica.counters.resting_leases == 1
        asking.cancel()
        await asyncio.wait([asking])
        served.log.gate.open()
        await answered(http)
        assert len(served.pool.hints) == 1
        await served.quiet(2)


async def test_gateway_that_ends_gives_back_what_it_kept() -> None:
    async with world() as served, client(served) as http:
        served.pool.may_keep = 4
        await answered(http)
        assert len(served.replica.leases) == 1
        await served.gateway.close()
        await nothing_is_kept(served)
