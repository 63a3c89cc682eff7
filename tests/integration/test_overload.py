"""More requests than the model has room for: who is served when, and what the others are told."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from serve_app.contracts import ModelState
from serve_app.fake_engine import FakeEngineConfig
from serve_app.queueing.ticket import POSITION_HEADER
from serve_app.records import Outcome
from tests.integration.fakes import (
    KEY,
    World,
    client,
    principal,
    until,
    world,
)

TEXT = "/v1/completions"
BODY = {"model": "small", "prompt": "Hello", "max_tokens": 2}


class Crowd:
    """Requests of several principals, asked in the background."""

    def __init__(self, served: World, http: httpx.AsyncClient) -> None:
        self.served = served
        self.http = http
        self.asked: list[asyncio.Task[httpx.Response]] = []

    def knows(self, key: str, **more: Any) -> None:
        """Let `key` sign in as the principal of that name."""
        self.served.authenticator.principals[key] = principal(key, **more)

    async def asks(self, key: str = KEY, times: int = 1) -> None:
        """Ask so often, and wait until all are in the queue, served, or refused."""
        for _ in range(times):
            waiting, ended = self.waiting, self.ended
            headers = {"authorization": f"Bearer {key}"}
            task = asyncio.create_task(self.http.post(TEXT, json=BODY, headers=headers))
            self.asked.append(task)
            while self.waiting == waiting and self.ended == ended:  # noqa: ASYNC110
                await asyncio.sleep(0.002)

    @property
    def waiting(self) -> int:
        """How many are in the queue."""
        return self.served.queue.waiting(self.served.gateway.config.models[0])

    @property
    def ended(self) -> int:
        """How many were answered."""
        return sum(task.done() for task in self.asked)

    async def answers(self) -> list[httpx.Response]:
        """Return all answers, in the order in which they were asked for."""
        return list(await asyncio.gather(*self.asked))

    def order(self) -> list[str]:
        """Return who was served, in that order."""
        served = [r for r in self.served.records if r.outcome is Outcome.COMPLETED]
        return [str(record.principal_id) for record in served]


def position(response: httpx.Response) -> int:
    return int(response.headers[POSITION_HEADER])


def advice_s(response: httpx.Response) -> int:
    return int(response.headers["retry-after"])


async def nothing_is_left(crowd: Crowd) -> None:
    """Check that every request has its row and nothing is held or waits."""
    served = crowd.served
    count = len(crowd.asked)
    await until(lambda: len(served.records) >= count and not served.app.busy)
    await until(lambda: served.replica.counters.live_leases == 0)
    assert len(served.records) == count
    assert crowd.waiting == 0
    assert served.limits.reserved == served.limits.settled
    assert set(served.limits.settled.values()) <= {1}


async def test_a_full_queue_refuses_and_every_one_has_its_row_and_its_place() -> None:
    async with world(queue={"max_waiting": 3}) as served, client(served) as http:
        crowd = Crowd(served, http)
        served.pool.capacity = 0
        await crowd.asks(times=5)
        served.pool.capacity = 1
        answers = await crowd.answers()
        assert [a.status_code for a in answers] == [200, 200, 200, 503, 503]
        assert [position(a) for a in answers] == [0, 1, 2, 3, 3]
        refused = answers[-1].json()["error"]
        assert (refused["code"], refused["type"]) == ("model_overloaded", "overloaded_error")
        await nothing_is_left(crowd)
        outcomes = sorted(str(r.error_code) for r in served.records)
        assert outcomes == ["None"] * 3 + ["model_overloaded"] * 2


async def test_the_advice_grows_with_the_queue_and_shrinks_with_the_speed() -> None:
    """The mean time of a slot is measured, so the figures follow from it."""
    advice: dict[tuple[float, int], int] = {}
    for seconds in (0.4, 1.6):
        speed = FakeEngineConfig(time_to_first_token_s=seconds, time_per_token_s=0)
        for places in (4, 12):
            full = {"max_waiting": places}
            async with world(speed, queue=full) as served, client(served) as http:
                crowd = Crowd(served, http)
                # One is served, so that its time is known.
                await crowd.asks()
                await crowd.answers()
                served.pool.capacity = 0
                await crowd.asks(times=places + 1)
                advice[seconds, places] = advice_s(await crowd.asked[-1])
                served.pool.capacity = None
                await crowd.answers()
                await nothing_is_left(crowd)
    assert advice[0.4, 4] < advice[0.4, 12] < advice[1.6, 12]
    assert advice[0.4, 4] < advice[1.6, 4] < advice[1.6, 12]
    # The queue and the newcomer itself, one after the other.
    assert advice[1.6, 12] >= 13 * 1.6


async def test_before_anything_was_measured_the_advice_is_the_longest_wait() -> None:
    terms: dict[str, Any] = {"queue": {"max_waiting": 1}, "queue_timeout_s": 17}
    async with world(**terms) as served, client(served) as http:
        crowd = Crowd(served, http)
        served.pool.capacity = 0
        await crowd.asks(times=2)
        assert advice_s(await crowd.asked[-1]) == 17
        served.pool.capacity = None
        await crowd.answers()
        await nothing_is_left(crowd)


async def test_who_waits_too_long_is_told_its_place_and_when_to_come_again() -> None:
    async with world(queue_timeout_s=0.1) as served, client(served) as http:
        crowd = Crowd(served, http)
        served.pool.capacity = 0
        await crowd.asks(times=2)
        answers = await crowd.answers()
        assert [a.status_code for a in answers] == [503, 503]
        assert [a.json()["error"]["code"] for a in answers] == ["model_not_ready"] * 2
        assert [position(a) for a in answers] == [0, 1]
        assert all(advice_s(a) >= 1 for a in answers)
        await nothing_is_left(crowd)


async def test_a_batch_user_with_100_waiting_does_not_delay_another_behind_them() -> None:
    async with world() as served, client(served, connections=200) as http:
        crowd = Crowd(served, http)
        crowd.knows("batch")
        served.pool.capacity = 0
        await crowd.asks("batch", times=100)
        await crowd.asks(KEY)
        served.pool.capacity = 1
        answers = await crowd.answers()
        assert {a.status_code for a in answers} == {200}
        assert position(answers[-1]) == 1
        assert crowd.order().index("user-1") == 1
        await nothing_is_left(crowd)


async def test_a_batch_user_cannot_fill_the_queue_for_others() -> None:
    async with world(queue={"max_waiting": 10}) as served, client(served) as http:
        crowd = Crowd(served, http)
        crowd.knows("batch")
        served.pool.capacity = 0
        await crowd.asks("batch", times=10)
        newest = crowd.asked[-1]
        await crowd.asks(KEY)
        displaced = await newest
        assert displaced.status_code == 503
        assert displaced.json()["error"]["code"] == "model_overloaded"
        served.pool.capacity = 1
        assert (await crowd.asked[-1]).status_code == 200
        await crowd.answers()
        await nothing_is_left(crowd)


async def test_the_roles_priority_decides_first_then_weight() -> None:
    standings = {
        "roles": {
            "urgent": {"priority": -10},
            "heavy": {"priority": 0, "weight": 2},
            "batch": {"priority": 100},
        }
    }
    async with world(standings=standings) as served, client(served) as http:
        crowd = Crowd(served, http)
        for role in ("urgent", "heavy", "batch"):
            crowd.knows(role, roles=frozenset({role}))
        served.pool.capacity = 0
        await crowd.asks("batch", times=2)
        await crowd.asks(KEY, times=3)
        await crowd.asks("heavy", times=4)
        await crowd.asks("urgent", times=2)
        assert crowd.waiting == 11
        served.pool.capacity = 1
        await crowd.answers()
        order = crowd.order()
        assert order[:2] == ["urgent", "urgent"]
        assert order[-2:] == ["batch", "batch"]
        middle = order[2:-2]
        # Two for each one of the weight 1, as long as both wait.
        assert middle[:6].count("heavy") == 4
        await nothing_is_left(crowd)


async def test_a_request_that_leaves_the_queue_makes_room() -> None:
    async with world(queue={"max_waiting": 2}) as served, client(served) as http:
        crowd = Crowd(served, http)
        served.pool.capacity = 0
        await crowd.asks(times=2)
        leaving = crowd.asked.pop(0)
        leaving.cancel()
        await asyncio.wait([leaving])
        await until(lambda: crowd.waiting == 1)
        await crowd.asks()
        served.pool.capacity = 1
        assert [a.status_code for a in await crowd.answers()] == [200, 200]
        crowd.asked.append(leaving)
        await nothing_is_left(crowd)
        assert sorted(r.status for r in served.records) == [200, 200, 499]


# Models that are not there.


async def test_a_cold_model_is_waited_for_longer_than_a_busy_one() -> None:
    async with world(queue_timeout_s=0.5) as served, client(served) as http:
        crowd = Crowd(served, http)
        served.pool.state_now = ModelState.ASLEEP
        await crowd.asks()
        # Longer than the wait for a busy one.
        await asyncio.wait(crowd.asked, timeout=0.8)
        assert crowd.waiting == 1
        served.pool.state_now = ModelState.SERVING
        [answer] = await crowd.answers()
        assert answer.status_code == 200
        assert position(answer) == 0
        await nothing_is_left(crowd)


async def test_a_cold_model_is_not_waited_for_without_end() -> None:
    models = [{"name": "small", "app": "m", "max_tokens": 9, "cold_timeout_s": 0.6}]
    async with world(models=models, queue_timeout_s=0.4) as served, client(served) as http:
        crowd = Crowd(served, http)
        served.pool.state_now = ModelState.ASLEEP
        await crowd.asks()
        [answer] = await crowd.answers()
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "model_not_ready"
        # Nothing is known of its start but the guess of the config.
        assert 50 <= advice_s(answer) <= 60
        await nothing_is_left(crowd)


async def test_a_cold_model_that_is_not_waited_for_is_started_all_the_same() -> None:
    models = [
        {"name": "small", "app": "m", "max_tokens": 9, "when_cold": "refuse", "start_guess_s": 40}
    ]
    async with world(models=models) as served, client(served) as http:
        crowd = Crowd(served, http)
        served.pool.state_now = ModelState.ASLEEP
        await crowd.asks(times=3)
        answers = await crowd.answers()
        assert [a.status_code for a in answers] == [503] * 3
        assert [a.json()["error"]["code"] for a in answers] == ["model_not_ready"] * 3
        assert all(30 <= advice_s(a) <= 40 for a in answers)
        assert [position(a) for a in answers] == [0, 1, 2]
        # A call is open: when the replica is up it is granted, and given back.
        assert served.pool.asking == 1
        served.pool.state_now = ModelState.SERVING
        await until(lambda: served.pool.asking == 0)
        await until(lambda: served.replica.counters.live_leases == 0)
        await crowd.asks()
        assert (await crowd.asked[-1]).status_code == 200
        # Its start was measured, so the next advice is that and not the guess.
        served.pool.state_now = ModelState.ASLEEP
        await crowd.asks()
        assert advice_s(await crowd.asked[-1]) < 30
        served.pool.state_now = ModelState.SERVING
        await until(lambda: served.pool.asking == 0)
        await nothing_is_left(crowd)


@pytest.mark.parametrize("state", [ModelState.ABSENT, ModelState.FAILED])
async def test_a_model_that_is_away_or_failed_is_refused_at_once(state: ModelState) -> None:
    # The test would run into its own limit if they waited.
    async with world(queue_timeout_s=3600) as served, client(served) as http:
        crowd = Crowd(served, http)
        served.pool.capacity, served.pool.state_now = 0, state
        await crowd.asks(times=3)
        answers = await crowd.answers()
        assert [a.status_code for a in answers] == [503] * 3
        assert [a.json()["error"]["code"] for a in answers] == ["model_not_ready"] * 3
        assert served.pool.asking == 0
        await nothing_is_left(crowd)


async def test_an_answer_that_streams_also_says_its_place() -> None:
    async with world() as served, client(served) as http:
        answer = await http.post(TEXT, json=BODY | {"stream": True})
        assert position(answer) == 0
        # What needs no model has no place.
        assert POSITION_HEADER not in (await http.get("/v1/models")).headers
        await served.quiet(records=2)
