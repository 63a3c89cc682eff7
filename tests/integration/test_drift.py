"""The accounts add up: what the log holds beside what the engines counted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import datetime, timedelta

import asyncpg
import pytest

from serve_app.accounts import writer
from serve_app.accounts.drift import (
    DriftConfig,
    EngineCounts,
    EngineReading,
    ModelDrift,
    drift_task,
    read_drift,
)
from serve_app.accounts.metrics import NoMetrics
from serve_app.engine_counters import EngineCounters
from serve_app.errors import Unavailable
from serve_app.fake_engine import FakeEngineConfig
from serve_app.lazy_pool import build_pool
from serve_app.records import Outcome, RequestRecord, new_id, utc_now
from serve_app.settings import PostgresSettings
from tests.integration.command_line import comp_ai
from tests.integration.fakes import World, client, until, world
from tests.sealing import subject_keys

MODEL = "model-small"
CHAT = "/v1/chat/completions"
AT_ONCE = DriftConfig(idle_after_s=0, busy_after_s=0)


@pytest.fixture
async def counts(database: PostgresSettings) -> AsyncIterator[EngineCounts]:
    made = EngineCounts(build_pool(database, application_name="tests", max_size=1))
    yield made
    await made.close()


def _reading(
    at: datetime, tokens: int, *, running: int = 0, started_at: datetime, replica: str = "replica-1"
) -> EngineReading:
    counters = EngineCounters(
        replica_id=replica, completion_tokens=tokens, requests_running=running
    )
    return EngineReading(model=MODEL, started_at=started_at, at=at, counters=counters)


def _row(begun: datetime, seconds: float, tokens: int, replica: str = "replica-1") -> RequestRecord:
    return RequestRecord(
        id=new_id(),
        request_id="r",
        created_at=begun,
        route="chat.completions",
        status=200,
        outcome=Outcome.COMPLETED,
        duration_ms=seconds * 1000,
        completion_tokens=tokens,
        replica_id=replica,
    )


async def _log(connection: asyncpg.Connection, rows: Sequence[RequestRecord]) -> None:
    await writer.prepare_session(connection)
    await writer.write(connection, rows, subject_keys())


async def _only(connection: asyncpg.Connection, config: DriftConfig = AT_ONCE) -> ModelDrift:
    (drift,) = await read_drift(connection, config)
    return drift


def _body(tokens: int, text: str = "one two three") -> dict[str, object]:
    return {
        "model": "small",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": tokens,
    }


async def _told(served: World, counts: EngineCounts, started_at: datetime) -> None:
    for replica in served.replicas:
        reading = EngineReading(
            model=MODEL, started_at=started_at, at=utc_now(), counters=replica.counters
        )
        await counts.note(reading)


async def test_what_passed_a_gateway_adds_up(
    connection: asyncpg.Connection, counts: EngineCounts
) -> None:
    """With answers that complete, a client that leaves, a replica that drops its first answer."""
    started_at = utc_now()
    speed = FakeEngineConfig(time_to_first_token_s=0, time_per_token_s=0.002)
    async with world(speed, replicas=2) as served, client(served) as http:
        for tokens in (1, 7, 20):
            assert (await http.post(CHAT, json=_body(tokens))).status_code == 200
        async with http.stream("POST", CHAT, json={**_body(2000), "stream": True}) as answer:
            await anext(answer.aiter_bytes())
        dropped = await http.post(CHAT, json=_body(20, "[[drop_after=5]]"))
        assert dropped.status_code == 502
        await served.quiet(records=5)
        await _told(served, counts, started_at)
        await _log(connection, served.records)
    drift = await _only(connection)
    # What an engine generated of a whole answer before it died, it told nobody.
    lost = 2 * (5 + 1)
    assert drift.engine_tokens - drift.log_tokens == lost
    assert (drift.replicas, drift.tokens) == (2, -lost)


async def test_row_that_is_missing_is_drift(
    connection: asyncpg.Connection, counts: EngineCounts
) -> None:
    """As where a gateway was killed with requests under way."""
    started_at = utc_now()
    async with world() as served, client(served) as http:
        for _ in range(4):
            await http.post(CHAT, json=_body(10))
        await served.quiet(records=4)
        await _told(served, counts, started_at)
        await _log(connection, served.records[1:])
    drift = await _only(connection)
    assert (drift.tokens, drift.open_tokens) == (-13, 0)
    assert drift.ratio == pytest.approx(-0.25)


async def test_requests_under_way_are_no_drift(
    connection: asyncpg.Connection, counts: EngineCounts
) -> None:
    started_at = utc_now()
    async with world() as served, client(served) as http:
        await http.post(CHAT, json=_body(10))
        stalled = {**_body(60, "[[stall_after=5]]"), "stream": True}
        async with http.stream("POST", CHAT, json=stalled):
            await until(lambda: served.replica.counters.completion_tokens == 15)
            await _told(served, counts, started_at)
        await served.quiet(records=2)
        await _log(connection, served.records)
    drift = await _only(connection)
    assert (drift.engine_tokens, drift.log_tokens, drift.open_tokens) == (19, 13, 6)
    assert drift.tokens == 0


async def test_scored_pairs_add_up(connection: asyncpg.Connection, counts: EngineCounts) -> None:
    """Where the engine computes on pairs, as a cross-encoder does: the query counts in each."""
    started_at = utc_now()
    models = [{"name": "small", "app": MODEL, "task": "score"}]
    async with world(models=models) as served, client(served) as http:
        body = {"model": "small", "query": "what is it", "documents": ["this", "that", "both"]}
        answer = await http.post("/v1/rerank", json=body)
        assert answer.status_code == 200, answer.text
        await served.quiet()
        await _told(served, counts, started_at)
        await _log(connection, served.records)
    assert (await _only(connection)).tokens == 0


NOW = utc_now()


def _ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


async def test_long_life_is_compared_over_the_last_day_only(
    connection: asyncpg.Connection, counts: EngineCounts
) -> None:
    started_at = _ago(3 * 86400)
    # Far within the day: these times count from when the suite began.
    for at, tokens in ((_ago(43_200), 1_000_000), (_ago(3600), 1_000_100)):
        await counts.note(_reading(at, tokens, started_at=started_at))
    await _log(connection, [_row(_ago(2 * 86400), 1, 5000), _row(_ago(5000), 1, 100)])
    drift = await _only(connection)
    assert (drift.engine_tokens, drift.log_tokens, drift.tokens) == (100, 100, 0)


async def test_row_that_is_there_twice_is_drift(
    connection: asyncpg.Connection, counts: EngineCounts
) -> None:
    await counts.note(_reading(_ago(100), 50, started_at=_ago(1000)))
    await _log(connection, [_row(_ago(500), 1, 50), _row(_ago(500), 1, 50)])
    drift = await _only(connection)
    assert (drift.tokens, drift.ratio) == (50, 1.0)


async def test_tokens_of_a_failed_attempt_may_stand_at_another_replica(
    connection: asyncpg.Connection, counts: EngineCounts
) -> None:
    for replica, tokens in (("replica-1", 5), ("replica-2", 20)):
        await counts.note(_reading(_ago(100), tokens, started_at=_ago(1000), replica=replica))
    await _log(connection, [_row(_ago(500), 1, 25, "replica-2")])
    drift = await _only(connection)
    assert (drift.replicas, drift.tokens) == (2, 0)


async def test_fresh_reading_waits_for_its_rows(
    connection: asyncpg.Connection, counts: EngineCounts
) -> None:
    now = utc_now()
    await counts.note(_reading(now - timedelta(seconds=10), 50, started_at=_ago(1000)))
    assert await read_drift(connection) == []
    busy = _reading(now - timedelta(seconds=500), 40, running=1, started_at=_ago(1000))
    await counts.note(busy)
    assert await read_drift(connection) == []
    await counts.note(_reading(now - timedelta(seconds=400), 40, started_at=_ago(1000)))
    (drift,) = await read_drift(connection)
    assert (drift.engine_tokens, drift.tokens) == (40, -40)


async def test_task_tells_the_ratios_and_drops_old_readings(
    connection: asyncpg.Connection, counts: EngineCounts
) -> None:
    class Metrics(NoMetrics):
        def accounting_drift(self, ratios: dict[str, float]) -> None:
            told.append(dict(ratios))

    told: list[dict[str, float]] = []
    reading = _reading(_ago(100), 100, started_at=_ago(1000))
    await counts.note(reading)
    await counts.note(reading)
    await counts.note(replace(reading, at=_ago(30 * 3600)))
    await _log(connection, [_row(_ago(500), 1, 99)])
    await drift_task(Metrics()).run(connection)
    assert told == [{MODEL: -0.01}]
    assert await connection.fetchval("select count(*) from comp_ai.engine_counts") == 1


async def test_command_shows_the_tokens_and_judges_them(
    database: PostgresSettings, connection: asyncpg.Connection, counts: EngineCounts
) -> None:
    await counts.note(_reading(_ago(100), 100, started_at=_ago(1000)))
    await _log(connection, [_row(_ago(500), 1, 98)])
    shown = await asyncio.to_thread(comp_ai, database, "log", "drift")
    assert (shown.returncode, "-2.00" in shown.stdout) == (1, True), shown.stderr
    shown = await asyncio.to_thread(comp_ai, database, "log", "drift", "--most", "0.03", "--json")
    assert shown.returncode == 0
    (told,) = json.loads(shown.stdout)
    assert (told["model"], told["engine_tokens"], told["ratio"]) == (MODEL, 100, -0.02)


async def test_reading_is_refused_while_postgres_is_away() -> None:
    nowhere = PostgresSettings.model_validate({"POSTGRES_HOST": "127.0.0.1", "POSTGRES_PORT": 1})
    counts = EngineCounts(build_pool(nowhere, application_name="tests", max_size=1))
    with pytest.raises(Unavailable):
        await counts.note(_reading(NOW, 1, started_at=NOW))


async def test_rows_of_a_replica_are_found_by_an_index(connection: asyncpg.Connection) -> None:
    await connection.execute("set enable_seqscan = off")
    plan = await connection.fetch(
        "explain select count(*) from comp_ai.requests "
        "where replica_id = 'a' and created_at > now() - interval '1 day'"
    )
    conditions = [row[0] for row in plan if "Index Cond" in row[0]]
    assert conditions
    assert all("replica_id" in condition for condition in conditions)
