"""Many spools on one machine: each has one holder, and none is forgotten."""

from __future__ import annotations

import asyncio
import shutil
import sys
import textwrap
import uuid
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import asyncpg
import pytest

from serve_app.accounts.metrics import NoMetrics
from serve_app.accounts.request_log import LogConfig, LogStatus, RequestLog
from serve_app.accounts.spool import Spool
from serve_app.accounts.spool_files import read_reports
from serve_app.accounts.spool_folders import SpoolFolders
from serve_app.database import connect
from serve_app.errors import ConfigError
from serve_app.records import Outcome, RequestRecord, new_id, utc_now
from serve_app.settings import PostgresSettings
from tests.sealing import FORM, subject_keys

_TIMEOUT_S = 60.0
_CONFIG = LogConfig(backoff_first_s=0.01, backoff_most_s=0.1, gauges_every_s=0.05, adopt_every_s=0)


def _record(**changes: object) -> RequestRecord:
    fields: dict[str, object] = {
        "id": new_id(),
        "request_id": "r",
        "created_at": utc_now(),
        "route": "/v1/chat/completions",
        "status": 200,
        "outcome": Outcome.COMPLETED,
    }
    return RequestRecord(**fields | changes)  # type: ignore[arg-type]


def _folders(root: Path) -> SpoolFolders:
    return SpoolFolders(root, partial(Spool, form=FORM, lock_timeout_s=0))


async def _leave(folder: Path, *records: RequestRecord) -> None:
    """Leave `records` in a spool that nobody holds."""
    spool = Spool(folder, form=FORM)
    await spool.open()
    await asyncio.gather(*(spool.append(record) for record in records))
    await spool.close()


@asynccontextmanager
async def _replica(root: Path, postgres: PostgresSettings) -> AsyncIterator[RequestLog]:
    folders = _folders(root)
    log = RequestLog(
        spool=await folders.take(),
        postgres=postgres,
        keys=subject_keys(),
        metrics=NoMetrics(),
        config=_CONFIG,
        folders=folders,
    )
    await log.start()
    try:
        yield log
    finally:
        await log.close()


async def _until(log: RequestLog, reached: Callable[[LogStatus], bool]) -> None:
    async with asyncio.timeout(_TIMEOUT_S):
        while not reached(await log.status()):
            pass  # each status is a turn of the spool's thread, so this does not spin


async def _ids(postgres: PostgresSettings) -> list[uuid.UUID]:
    connection = await connect(postgres, application_name="tests")
    try:
        rows: list[asyncpg.Record] = await connection.fetch("select id from comp_ai.requests")
    finally:
        await connection.close()
    return sorted(row["id"] for row in rows)


@asynccontextmanager
async def _holder(root: Path) -> AsyncIterator[tuple[Process, set[uuid.UUID]]]:
    """Let a process take a spool, and give what it acknowledged; it is killed at the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(_HOLDER), root, stdout=PIPE
    )
    assert process.stdout is not None
    try:
        lines = [await process.stdout.readline() for _ in range(100)]
        yield process, {uuid.UUID(line.decode().strip()) for line in lines}
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


_HOLDER = """
    import asyncio, sys
    from functools import partial
    from pathlib import Path
    from serve_app.accounts.sealing.master_keys import MasterKeys
    from serve_app.accounts.spool import Spool
    from serve_app.accounts.spool_folders import SpoolFolders
    from serve_app.accounts.spooled import SpooledForm
    from serve_app.records import Outcome, RequestRecord, new_id, utc_now

    async def main():
        make = partial(Spool, form=SpooledForm(MasterKeys([])), lock_timeout_s=0)
        folders = SpoolFolders(Path(sys.argv[1]), make)
        spool = await folders.take()
        for _ in range(100):
            record = RequestRecord(
                id=new_id(), request_id="r", created_at=utc_now(), route="x", status=200,
                outcome=Outcome.COMPLETED,
            )
            await spool.append(record)
            print(record.id, flush=True)
        await asyncio.Event().wait()

    asyncio.run(main())
"""


# Who has which.


async def test_each_takes_a_spool_of_its_own_and_free_ones_are_taken_again(tmp_path: Path) -> None:
    folders = _folders(tmp_path)
    first, second = await folders.take(), await folders.take()
    assert [spool.folder.name for spool in (first, second)] == ["0", "1"]
    await first.close()
    third = await folders.take()
    assert third.folder == first.folder
    for spool in (second, third):
        await spool.close()


async def test_what_is_held_is_not_abandoned(tmp_path: Path) -> None:
    folders = _folders(tmp_path)
    async with _holder(tmp_path) as (process, acked):
        assert [spool async for spool in folders.abandoned()] == []
        process.kill()
        await process.wait()
        (left,) = [spool async for spool in folders.abandoned()]
        assert await left.depth() == len(acked) == 100
        # It is held now, here.
        assert [spool async for spool in _folders(tmp_path).abandoned()] == []
        await left.close()


async def test_an_empty_spool_is_left_alone_until_something_is_put_into_it(tmp_path: Path) -> None:
    folders = _folders(tmp_path)
    await _leave(tmp_path / "7")
    assert [spool async for spool in folders.abandoned()] == []
    await _leave(tmp_path / "7", _record())
    (left,) = [spool async for spool in folders.abandoned()]
    await folders.let_go(left)
    assert [spool async for spool in folders.abandoned()] == []


async def test_a_damaged_spool_is_passed_over_and_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = tmp_path / "0" / Spool.FILE
    damaged.parent.mkdir()
    damaged.write_bytes(b"this is no database, nor was it one" * 100)
    folders = _folders(tmp_path)
    spool = await folders.take()
    assert spool.folder.name == "1"
    assert [spool async for spool in folders.abandoned()] == []
    assert damaged.read_bytes().startswith(b"this is no database")
    assert "cannot be read" in caplog.text
    await spool.close()


async def test_a_root_that_cannot_be_made_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="the spool folder"):
        await _folders(tmp_path / "file" / "spool").take()


async def test_spools_are_read_from_outside_while_they_are_held_and_after(tmp_path: Path) -> None:
    async with _holder(tmp_path) as (process, _):
        (alive,) = read_reports(tmp_path)
        process.kill()
        await process.wait()
        (dead,) = read_reports(tmp_path)
    assert (alive.held, alive.depth) == (True, 100)
    assert (dead.held, dead.depth, dead.poison) == (False, 100, 0)
    assert dead.oldest_age_s >= alive.oldest_age_s > 0
    assert dead.bytes > 0
    damaged = tmp_path / "1" / Spool.FILE
    damaged.parent.mkdir()
    damaged.write_bytes(b"this is no database, nor was it one" * 100)
    assert [report.error for report in read_reports(tmp_path)] == [
        None,
        f"The spool {damaged.parent} cannot be opened: SQLITE_NOTADB.",
    ]


# From there into PostgreSQL.


async def test_the_spool_of_a_killed_process_is_adopted(
    tmp_path: Path, database: PostgresSettings
) -> None:
    async with _holder(tmp_path) as (process, acked), _replica(tmp_path, database) as log:
        await log.append(own := _record())
        await _until(log, lambda status: status.written_total == 1)
        assert await _ids(database) == [own.id]  # the other one lives
        process.kill()
        await _until(log, lambda status: status.written_total == 101 and status.depth == 0)
        assert await _ids(database) == sorted({*acked, own.id})
        log.check()
    taken = await _folders(tmp_path).take()
    assert (taken.folder.name, await taken.depth()) == ("0", 0)
    await taken.close()


async def test_spools_of_before_and_of_lost_hosts_are_adopted(
    tmp_path: Path, database: PostgresSettings
) -> None:
    before, lost = _record(), _record()
    await _leave(tmp_path / "spool", before)
    await _leave(tmp_path / "elsewhere", lost)
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "spool" / "host-b")
    async with _replica(tmp_path / "spool", database) as log:
        await _until(log, lambda status: status.written_total == 2)
    assert await _ids(database) == sorted([before.id, lost.id])


async def test_a_record_that_is_in_several_spools_is_one_row(
    tmp_path: Path, database: PostgresSettings
) -> None:
    records = [_record() for _ in range(50)]
    # Each replica takes one of them.
    for name in ("0", "1"):
        await _leave(tmp_path / name, *records)
    async with _replica(tmp_path, database) as one, _replica(tmp_path, database) as other:
        assert await asyncio.gather(one.drain(_TIMEOUT_S), other.drain(_TIMEOUT_S)) == [True, True]
    assert await _ids(database) == sorted(record.id for record in records)


async def test_two_replicas_adopt_beside_each_other(
    tmp_path: Path, database: PostgresSettings
) -> None:
    records = [_record() for _ in range(200)]
    for number in range(8):
        await _leave(tmp_path / f"host-{number}", *records[number * 25 : (number + 1) * 25])
    async with _replica(tmp_path, database) as one, _replica(tmp_path, database) as other:
        async with asyncio.timeout(_TIMEOUT_S):
            while True:
                states = [await log.status() for log in (one, other)]
                if sum(state.written_total for state in states) == len(records):
                    break
    assert await _ids(database) == sorted(record.id for record in records)


async def test_what_a_stopping_replica_cannot_drain_is_adopted(
    tmp_path: Path, database: PostgresSettings
) -> None:
    away = database.model_copy(update={"host": "/nonexistent"})
    async with _replica(tmp_path, away) as surplus:
        await surplus.append(record := _record())
        assert not await surplus.drain(0)
    # What a replica finds in the spool that it takes is its own.
    held = await _folders(tmp_path).take()
    async with _replica(tmp_path, database) as log:
        await held.close()
        await _until(log, lambda status: status.written_total == 1)
    assert await _ids(database) == [record.id]


async def test_poison_of_an_adopted_spool_blocks_nobody_and_stays_there(
    tmp_path: Path, database: PostgresSettings
) -> None:
    bad, good = _record(prompt_tokens=-1), _record()
    await _leave(tmp_path / "3", bad, good)
    async with _replica(tmp_path, database) as log:
        await _until(log, lambda status: status.written_total == 1 and status.depth == 0)
        await log.append(own := _record())
        assert await log.drain(_TIMEOUT_S)
        assert (await log.status()).poison_total == 1
    assert await _ids(database) == sorted([good.id, own.id])
    kept = Spool(tmp_path / "3", form=FORM)
    await kept.open()
    reason = "CheckViolationError 23514 requests_prompt_tokens_check"
    assert await kept.poisoned() == [(bad.id, reason)]
    await kept.close()


async def test_an_adopted_spool_that_fails_does_not_stop_the_own(
    tmp_path: Path, database: PostgresSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _leave(tmp_path / "3", _record())
    healthy = Spool.discard

    async def discard(spool: Spool, ids: object) -> None:
        if spool.folder.name == "3":
            await spool._do(lambda connection: connection.execute("no sql"))
        await healthy(spool, ids)  # type: ignore[arg-type]

    monkeypatch.setattr(Spool, "discard", discard)
    async with _replica(tmp_path, database) as log:
        await _until(log, lambda status: status.written_total == 1)
        await log.append(_record())
        assert await log.drain(_TIMEOUT_S)
        log.check()
    assert len(await _ids(database)) == 2
