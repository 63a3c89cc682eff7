"""From the spool to PostgreSQL: each record once and only once, on good days and bad."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from serve_app.accounts import writer
from serve_app.accounts.request_log import LogBroken, LogConfig, LogStatus, RequestLog
from serve_app.accounts.spool import Spool, SpooledRow
from serve_app.database import connect, migrate
from serve_app.records import Outcome, PrincipalKind, RequestRecord, new_id, utc_now
from serve_app.settings import PostgresSettings
from tests.integration.conftest import MIGRATIONS, PostgresServer
from tests.integration.links import Link
from tests.sealing import FORM, subject_keys

_TIMEOUT_S = 60.0
_CONFIG = LogConfig(backoff_first_s=0.01, backoff_most_s=0.1, gauges_every_s=0.05)


class Metrics:
    """Keeps what the log reports."""

    def __init__(self) -> None:
        self.depths: list[int] = []
        self.lags: list[float] = []
        self.writes: list[float] = []
        self.rows: list[int] = []
        self.not_redacted: list[int] = []
        self._told = asyncio.Event()

    async def until(self, reached: Callable[[], bool]) -> None:
        async with asyncio.timeout(_TIMEOUT_S):
            while not reached():
                self._told.clear()
                await self._told.wait()

    def spool_depth(self, rows: int) -> None:
        self.depths.append(rows)

    def spool_full(self, full: bool) -> None:
        self.full = full

    def spool_lag_s(self, seconds: float) -> None:
        self.lags.append(seconds)
        self._told.set()

    def postgres_write_s(self, seconds: float) -> None:
        self.writes.append(seconds)

    def bodies_not_redacted(self, rows: int) -> None:
        self.not_redacted.append(rows)

    def rows_written(self, rows: int) -> None:
        self.rows.append(rows)


def _record(**changes: object) -> RequestRecord:
    plain = RequestRecord(
        id=new_id(),
        request_id="r",
        created_at=utc_now(),
        route="/v1/chat/completions",
        status=200,
        outcome=Outcome.COMPLETED,
        principal_id="ann",
        model="m",
        request_body="ask",
        response_text="answer",
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def _full_record() -> RequestRecord:
    return _record(
        error_code="none",
        principal_kind=PrincipalKind.API_KEY,
        api_key_id=uuid.uuid4(),
        client_address="2001:db8::1",
        stream=True,
        finish_reason="stop",
        prompt_tokens=11,
        completion_tokens=22,
        cost_micros=33,
        auth_ms=0.25,
        limits_ms=0.5,
        queue_ms=1.5,
        time_to_first_token_ms=100.5,
        inter_token_mean_ms=12.25,
        traceparent="00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        duration_ms=900.125,
        replica_id="replica-1",
        denied="model:m",
        bodies="full",
    )


@asynccontextmanager
async def _log(
    folder: Path,
    postgres: PostgresSettings,
    config: LogConfig = _CONFIG,
    metrics: Metrics | None = None,
) -> AsyncIterator[RequestLog]:
    log = RequestLog(
        spool=Spool(folder, form=FORM),
        postgres=postgres,
        keys=subject_keys(),
        metrics=metrics or Metrics(),
        config=config,
    )
    await log.start()
    try:
        yield log
    finally:
        await log.close()


async def _rows(postgres: PostgresSettings, query: str) -> list[asyncpg.Record]:
    connection = await connect(postgres, application_name="tests")
    try:
        return await connection.fetch(query)
    finally:
        await connection.close()


async def _ids(postgres: PostgresSettings) -> list[uuid.UUID]:
    return [row["id"] for row in await _rows(postgres, "select id from comp_ai.requests")]


async def _away(log: RequestLog) -> None:
    """Wait until the log has noticed that PostgreSQL is away."""
    await _until(log, lambda status: not status.postgres_ok and status.last_error is not None)


async def _until(log: RequestLog, reached: Callable[[LogStatus], bool]) -> None:
    async with asyncio.timeout(_TIMEOUT_S):
        while not reached(await log.status()):
            pass  # each status is a turn of the spool's thread, so this does not spin


@pytest.fixture
async def connection(connection: asyncpg.Connection) -> asyncpg.Connection:
    await writer.prepare_session(connection)
    return connection


async def test_record_arrives_whole(tmp_path: Path, database: PostgresSettings) -> None:
    record = _full_record()
    async with _log(tmp_path, database) as log:
        await log.append(record)
        assert await log.drain(_TIMEOUT_S)
    (row,) = await _rows(
        database,
        "select * from comp_ai.requests join comp_ai.request_bodies using (id, created_at)",
    )
    texts = {"request_body": None, "response_text": None}  # they are sealed
    # Of the place in a trace the trace alone is kept.
    names = {f.name for f in fields(record)} - {"traceparent"} | {"trace_id"}
    assert {name: row[name] for name in names} == {
        **{name: getattr(record, name) for name in names},
        **texts,
    }


async def test_rows_land_in_the_partition_of_their_month(
    tmp_path: Path, database: PostgresSettings
) -> None:
    await _rows(database, "select comp_ai.ensure_request_partitions(now()::date, 1)")
    async with _log(tmp_path, database) as log:
        await log.append(_record())
        assert await log.drain(_TIMEOUT_S)
    (place,) = await _rows(
        database,
        "select relname as t from comp_ai.requests r join pg_class c on c.oid = r.tableoid",
    )
    assert place["t"].startswith("requests_y")


async def test_status_and_metrics_tell_what_happened(
    tmp_path: Path, database: PostgresSettings
) -> None:
    metrics = Metrics()
    log = RequestLog(
        spool=Spool(tmp_path, form=FORM),
        postgres=database,
        keys=subject_keys(),
        metrics=metrics,
        config=_CONFIG,
    )
    with pytest.raises(LogBroken, match="not started"):
        log.check()
    await log.start()
    for _ in range(3):
        await log.append(_record())
    assert await log.drain(_TIMEOUT_S)
    status = await log.status()
    assert (status.depth, status.lag_s, status.postgres_ok) == (0, 0.0, True)
    assert (status.written_total, status.poison_total, status.last_error) == (3, 0, None)
    assert status.last_write_ms is not None
    assert sum(metrics.rows) == 3
    assert min(metrics.rows) > 0
    assert metrics.writes
    await metrics.until(lambda: metrics.depths[-1] == 0)
    log.check()
    await log.close()
    with pytest.raises(LogBroken):
        log.check()


async def test_repeated_batch_adds_nothing(connection: asyncpg.Connection) -> None:
    records = [_record() for _ in range(5)]
    assert (await writer.write(connection, records, subject_keys())).written == 5
    again = await writer.write(connection, [*records, _record()], subject_keys())
    assert (again.written, again.poison) == (1, [])
    assert await connection.fetchval("select count(*) from comp_ai.request_bodies") == 6


async def test_a_writer_that_went_silent_in_its_transaction_is_not_waited_for(
    database: PostgresSettings, connection: asyncpg.Connection
) -> None:
    records = [_record()]
    silent = await connect(database, application_name="tests-silent", statement_timeout_s=0.3)
    await silent.transaction().start()
    await writer.write(silent, records, subject_keys())
    # It holds the place of the row, and its link passes nothing on any more.
    assert (await writer.write(connection, records, subject_keys())).written == 1
    silent.terminate()


async def test_no_bodies_no_body_rows(connection: asyncpg.Connection) -> None:
    await writer.write(connection, [_record(request_body=None, response_text=None)], subject_keys())
    assert await connection.fetchval("select count(*) from comp_ai.requests") == 1
    assert await connection.fetchval("select count(*) from comp_ai.request_bodies") == 0


async def test_nul_and_long_texts_do_not_lose_the_row(connection: asyncpg.Connection) -> None:
    record = _record(
        request_id="r" * 1000,
        model="\x00m" * 1000,
        principal_id="p" * 1000,
        client_address="\x00",
    )
    assert (await writer.write(connection, [record], subject_keys())).written == 1
    row = await connection.fetchrow("select * from comp_ai.requests_plain")
    assert row is not None
    assert len(row["model_used"]) == 100
    assert len(row["user_id"]) == 255


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt_tokens": 2**40}, "NumericValueOutOfRangeError 22003"),
        ({"prompt_tokens": -1}, "CheckViolationError 23514 requests_prompt_tokens_check"),
        ({"duration_ms": None}, "NotNullViolationError 23502 duration_ms"),
        ({"route": 7}, "DataError 22000"),
    ],
)
async def test_bad_rows_are_named_and_the_others_written(
    connection: asyncpg.Connection, change: dict[str, object], reason: str
) -> None:
    good = [_record() for _ in range(20)]
    bad = _record(request_body="secret prompt", **change)
    report = await writer.write(connection, [*good[:7], bad, *good[7:]], subject_keys())
    assert report.written == 20
    assert report.poison == [(bad.id, reason)]
    assert await connection.fetchval("select count(*) from comp_ai.requests") == 20


async def test_poison_is_set_aside_and_does_not_block(
    tmp_path: Path, database: PostgresSettings, caplog: pytest.LogCaptureFixture
) -> None:
    bad = _record(prompt_tokens=-1, request_body="secret prompt")
    foreign = _record()
    spool = Spool(tmp_path, form=FORM)
    await spool.open()
    await spool.append(foreign)
    data = foreign.to_json().replace(b'"route"', b'"way"')
    await spool._do(lambda con: con.execute("update spool set data = ?", (data,)).rowcount)
    await spool.close()
    async with _log(tmp_path, database) as log:
        for record in (_record(), bad, _record()):
            await log.append(record)
        assert await log.drain(_TIMEOUT_S)
        status = await log.status()
        assert (status.written_total, status.poison_total, status.depth) == (2, 2, 0)
    with sqlite3.connect(tmp_path / "spool.sqlite3") as kept:
        reasons = {
            uuid.UUID(bytes=row_id): reason
            for row_id, reason in kept.execute("select id, reason from poison")
        }
    kept.close()
    assert reasons.keys() == {bad.id, foreign.id}
    assert reasons[foreign.id] == "not a record of this release: ValueError"
    assert "secret prompt" not in json.dumps(list(reasons.values())) + caplog.text


async def test_a_backlog_with_poison_is_moved_batch_after_batch(
    tmp_path: Path, database: PostgresSettings
) -> None:
    records = [_record(prompt_tokens=-1 if number % 13 == 5 else 1) for number in range(100)]
    await _spool_all(tmp_path, records)
    async with _log(tmp_path, database, replace(_CONFIG, batch_rows=7)) as log:
        assert await log.drain(_TIMEOUT_S)
        status = await log.status()
        assert (status.written_total, status.poison_total, status.depth) == (92, 8, 0)
    good = [record.id for record in records if record.prompt_tokens == 1]
    assert sorted(await _ids(database)) == sorted(good)


async def _spool_all(folder: Path, records: Iterable[RequestRecord]) -> None:
    spool = Spool(folder, form=FORM)
    await spool.open()
    await asyncio.gather(*(spool.append(record) for record in records))
    await spool.close()


class _WatchedSpool(Spool):
    """Tells when rows behind others were read."""

    read_on: asyncio.Event

    async def batch(
        self, limit: int, *, max_bytes: int = 1 << 24, after: int = 0
    ) -> list[SpooledRow]:
        rows = await super().batch(limit, max_bytes=max_bytes, after=after)
        if after:
            self.read_on.set()
        return rows


async def test_the_next_batch_is_read_while_postgres_writes(
    tmp_path: Path, database: PostgresSettings, connection: asyncpg.Connection
) -> None:
    await _spool_all(tmp_path, [_record() for _ in range(20)])
    spool = _WatchedSpool(tmp_path, form=FORM)
    spool.read_on = asyncio.Event()
    log = RequestLog(
        spool=spool,
        postgres=database,
        keys=subject_keys(),
        metrics=Metrics(),
        config=replace(_CONFIG, batch_rows=5),
    )
    async with connection.transaction():
        # No row is written before this ends, since none is without its usage.
        await connection.execute("lock table comp_ai.usage_pending in exclusive mode")
        await log.start()
        async with asyncio.timeout(_TIMEOUT_S):
            await spool.read_on.wait()
        assert (await log.status()).written_total == 0
    assert await log.drain(_TIMEOUT_S)
    await log.close()
    assert len(await _ids(database)) == 20


async def test_log_starts_and_appends_while_postgres_is_away(
    tmp_path: Path, database: PostgresSettings
) -> None:
    away = database.model_copy(update={"host": "/nonexistent"})
    records = [_record() for _ in range(20)]
    async with _log(tmp_path, away) as log:
        await asyncio.gather(*(log.append(record) for record in records))
        await _away(log)
        log.check()  # an absence is not a fault of ours
        assert not await log.drain(0)
        status = await log.status()
        assert (status.depth, status.postgres_ok) == (20, False)
        assert status.last_error == "FileNotFoundError"
    async with _log(tmp_path, database) as log:
        assert await log.drain(_TIMEOUT_S)
    assert sorted(await _ids(database)) == sorted(record.id for record in records)


async def test_what_waits_is_told_while_postgres_is_silent(
    tmp_path: Path, database: PostgresSettings
) -> None:
    link, metrics = Link(database), Metrics()
    await link.mend()
    async with _log(tmp_path, link.settings, metrics=metrics) as log:
        await log.append(_record())
        assert await log.drain(_TIMEOUT_S)
        link.silence()
        await log.append(_record())
        # One write takes far longer before it is given up.
        await metrics.until(lambda: metrics.depths[-5:] == [1] * 5)
        assert 0 < metrics.lags[-5] < metrics.lags[-1]
        await link.cut()


async def test_log_waits_for_the_schema(tmp_path: Path, empty_database: PostgresSettings) -> None:
    async with _log(tmp_path, empty_database) as log:
        await log.append(_record())
        await _away(log)
        assert (await log.status()).last_error == "UndefinedTableError"
        await migrate(empty_database, directory=MIGRATIONS)
        assert await log.drain(_TIMEOUT_S)
    assert len(await _ids(empty_database)) == 1


async def test_old_records_land_in_the_default_partition(
    tmp_path: Path, database: PostgresSettings
) -> None:
    async with _log(tmp_path, database) as log:
        await log.append(_record(created_at=datetime(2001, 1, 1, tzinfo=UTC)))
        assert await log.drain(_TIMEOUT_S)
    (place,) = await _rows(
        database,
        "select relname as t from comp_ai.requests r join pg_class c on c.oid = r.tableoid",
    )
    assert place["t"] == "requests_default"


async def test_idle_log_notices_that_its_session_was_cut(
    tmp_path: Path, database: PostgresSettings, postgres_server: PostgresServer
) -> None:
    async with _log(tmp_path, database) as log:
        await log.append(_record())
        assert await log.drain(_TIMEOUT_S)
        await _cut_sessions(postgres_server, database)
        await log.append(_record())
        assert await log.drain(_TIMEOUT_S)
        log.check()
    assert len(await _ids(database)) == 2


async def _cut_sessions(server: PostgresServer, database: PostgresSettings) -> None:
    await _rows(
        server.embedded.admin_settings(),
        "select pg_terminate_backend(pid) from pg_stat_activity "
        f"where datname = '{database.database}' and application_name = 'comp-ai request-log'",
    )


async def test_sessions_cut_again_and_again_under_load(
    tmp_path: Path, database: PostgresSettings, postgres_server: PostgresServer
) -> None:
    config = replace(_CONFIG, batch_rows=7)
    acked: list[uuid.UUID] = []
    async with _log(tmp_path, database, config) as log:
        load = [asyncio.create_task(_append(log, 100, acked)) for _ in range(5)]
        while not all(task.done() for task in load):
            await _cut_sessions(postgres_server, database)
        await asyncio.gather(*load)
        assert await log.drain(_TIMEOUT_S)
    assert sorted(await _ids(database)) == sorted(acked)
    assert len(acked) == 500


async def _append(log: RequestLog, number: int, acked: list[uuid.UUID]) -> None:
    for _ in range(number):
        record = _record(request_body="x" * 1000)
        await log.append(record)
        acked.append(record.id)


async def test_postgres_killed_under_load_loses_and_doubles_nothing(
    tmp_path: Path, own_server: PostgresServer
) -> None:
    postgres = own_server.embedded.settings()
    acked: list[uuid.UUID] = []
    async with _log(tmp_path, postgres, replace(_CONFIG, batch_rows=11)) as log:
        load = [asyncio.create_task(_append(log, 200, acked)) for _ in range(5)]
        await _until(log, lambda status: status.written_total >= 100)
        await asyncio.to_thread(own_server.kill)
        await asyncio.gather(*load)  # appends never wait for PostgreSQL
        await _away(log)
        left = (await log.status()).depth
        await asyncio.to_thread(own_server.start)
        assert await log.drain(_TIMEOUT_S)
        log.check()
    assert left > 0
    assert sorted(await _ids(postgres)) == sorted(acked)
    bodies = await _rows(postgres, "select count(*) as n from comp_ai.request_bodies")
    assert bodies[0]["n"] == len(acked) == 1000


async def test_a_cut_that_asyncpg_takes_for_a_bug_is_an_absence(
    tmp_path: Path, database: PostgresSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, cut = writer.write, asyncio.Event()

    async def cut_once(connection: Any, *args: Any) -> writer.WriteReport:
        if not cut.is_set():
            cut.set()
            connection.terminate()
            connection._protocol.bind_execute()  # what asyncpg does between two answers
        return await write(connection, *args)

    monkeypatch.setattr(writer, "write", cut_once)
    async with _log(tmp_path, database) as log:
        await log.append(_record())
        assert await log.drain(_TIMEOUT_S)
        log.check()
    assert cut.is_set()
    assert len(await _ids(database)) == 1


async def test_dead_drain_fails_the_check(
    tmp_path: Path, database: PostgresSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def bug(*args: object) -> Iterable[object]:
        raise KeyError

    monkeypatch.setattr(writer, "write", bug)
    async with _log(tmp_path, database) as log:
        await log.append(_record())
        assert log._drain_task is not None
        await asyncio.wait([log._drain_task])
        with pytest.raises(LogBroken, match="ended: KeyError"):
            log.check()
        await log.append(_record())  # the spool still takes them
