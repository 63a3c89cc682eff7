"""`comp-ai log`: what waits, and what was set aside, while the service runs and while not."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from serve_app.accounts.metrics import NoMetrics
from serve_app.accounts.request_log import RequestLog
from serve_app.accounts.spool import Spool
from serve_app.database import connect
from serve_app.records import Outcome, RequestRecord, new_id, utc_now
from serve_app.settings import PostgresSettings
from tests.integration.command_line import comp_ai
from tests.sealing import FORM, subject_keys

_REASON = "DataError 22003"


def _record() -> RequestRecord:
    return RequestRecord(
        id=new_id(),
        request_id="r",
        created_at=utc_now(),
        route="x",
        status=200,
        outcome=Outcome.COMPLETED,
        request_body="secret prompt",
    )


class Command:
    """`comp-ai log` at one home."""

    def __init__(self, settings: PostgresSettings, home: Path) -> None:
        self._settings = settings
        self._home = home

    async def __call__(self, *arguments: str, code: int = 0) -> str:
        done = await asyncio.to_thread(
            comp_ai, self._settings, "log", *arguments, COMP_AI_HOME=str(self._home)
        )
        assert done.returncode == code, done.stderr
        assert "secret prompt" not in done.stdout + done.stderr
        return done.stdout if code == 0 else done.stderr

    async def json(self, *arguments: str) -> Any:
        return json.loads(await self(*arguments, "--json"))


@pytest.fixture
def log(database: PostgresSettings, tmp_path: Path) -> Command:
    return Command(database, tmp_path)


async def _fill(home: Path, number: int, aside: int) -> list[uuid.UUID]:
    """Leave `number` records in a spool, the first `aside` of them set aside; return their ids."""
    spool = Spool(home / "spool" / "0", form=FORM)
    await spool.open()
    records = [_record() for _ in range(number)]
    for record in records:
        await spool.append(record)
    await spool.set_aside((record.id, _REASON) for record in records[:aside])
    await spool.close()
    return [record.id for record in records]


async def _started(home: Path, postgres: PostgresSettings) -> RequestLog:
    log = RequestLog(
        spool=Spool(home / "spool" / "0", form=FORM),
        postgres=postgres,
        keys=subject_keys(),
        metrics=NoMetrics(),
    )
    await log.start()
    return log


async def _fetch(settings: PostgresSettings, query: str) -> Sequence[asyncpg.Record]:
    connection = await connect(settings, application_name="tests")
    rows: list[asyncpg.Record] = await connection.fetch(query)
    await connection.close()
    return rows


async def test_what_waits_is_told_also_while_nothing_runs(
    log: Command, tmp_path: Path, database: PostgresSettings
) -> None:
    assert (await log.json("status"))["spools"] == []
    await _fill(tmp_path, 5, 2)
    found = await log.json("status")
    assert (found["depth"], found["poison"]) == (3, 2)
    assert found["lag_s"] > 0
    assert found["bytes"] > 0
    (spool,) = found["spools"]
    assert (spool["folder"], spool["held"], spool["depth"], spool["poison"], spool["error"]) == (
        str(tmp_path / "spool" / "0"),
        False,
        3,
        2,
        None,
    )
    assert found["postgres"] == {"last_recorded_at": None, "error": None}
    running = await _started(tmp_path, database)
    assert await running.drain(60)
    found = await log.json("status")
    assert (found["depth"], found["lag_s"], found["spools"][0]["held"]) == (0, 0.0, True)
    assert found["postgres"]["last_recorded_at"] is not None
    await running.close()


async def test_postgres_may_be_away(tmp_path: Path, database: PostgresSettings) -> None:
    await _fill(tmp_path, 1, 0)
    away = Command(database.model_copy(update={"host": "/nonexistent"}), tmp_path)
    found = await away.json("status")
    assert found["depth"] == 1
    assert found["postgres"]["error"]
    assert "waiting: 1" in await away("status")


async def test_what_was_set_aside_is_listed_put_back_and_dropped(
    log: Command, tmp_path: Path, database: PostgresSettings
) -> None:
    first, second, third, _ = map(str, await _fill(tmp_path, 4, 3))
    listed = await log.json("poison", "list")
    assert [(row["id"], row["reason"]) for row in listed] == [
        (row_id, _REASON) for row_id in (first, second, third)
    ]
    assert "Not set aside" in await log("poison", "restore", str(new_id()), code=1)
    assert "put back 1" in await log("poison", "restore", second)

    refused = await log("poison", "drop", first, code=2)
    assert "--yes" in refused
    assert len(await log.json("poison", "list")) == 2
    assert "deleted 1" in await log("poison", "drop", first, "--yes")
    assert [row["id"] for row in await log.json("poison", "list")] == [third]
    (act,) = await _fetch(database, "select action, target, after from comp_ai.audit_log")
    assert (act["action"], act["target"]) == ("poison.drop", str(tmp_path / "spool" / "0"))
    assert json.loads(act["after"]) == {"records": {first: _REASON}}

    running = await _started(tmp_path, database)
    # Beside the process that holds the spool.
    assert "put back 1" in await log("poison", "restore")
    async with asyncio.timeout(60):
        while (await running.status()).written_total < 3:
            pass  # each status is a turn of the spool's thread, so this does not spin
    await running.close()
    kept = [str(row["id"]) for row in await _fetch(database, "select id from comp_ai.requests")]
    assert first not in kept
    assert {second, third} < set(kept)
