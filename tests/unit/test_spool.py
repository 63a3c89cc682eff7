"""The spool: what it acknowledged is on disk, whatever happens next."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading
import uuid
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from serve_app import group_commit
from serve_app.accounts import spool as spool_module
from serve_app.accounts.sealing.master_keys import MasterKeys, new_master_key
from serve_app.accounts.spool import Spool, SpooledRow
from serve_app.accounts.spooled import SpooledForm
from serve_app.errors import ConfigError, LogUnavailable
from serve_app.records import Outcome, RequestRecord, new_id, utc_now
from tests.sealing import FORM

_MIB = 1024 * 1024


def _record(body: str | None = None) -> RequestRecord:
    return RequestRecord(
        id=new_id(),
        request_id="r",
        created_at=utc_now(),
        route="/v1/completions",
        status=200,
        outcome=Outcome.COMPLETED,
        request_body=body,
    )


def _ids(rows: Sequence[SpooledRow]) -> list[uuid.UUID]:
    return [row.id for row in rows]


@pytest.fixture
async def spool(tmp_path: Path) -> AsyncIterator[Spool]:
    opened = Spool(tmp_path / "spool", form=FORM, lock_timeout_s=0)
    await opened.open()
    yield opened
    await opened.close()


class Gate:
    """Holds the spool's thread inside a job, so that others pile up behind it."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._open = threading.Event()
        self._entered = threading.Event()

    async def __aenter__(self) -> None:
        self._job = asyncio.create_task(self._spool._do(self._hold))
        await asyncio.to_thread(self._entered.wait)

    def _hold(self, connection: sqlite3.Connection) -> None:
        self._entered.set()
        self._open.wait()

    async def __aexit__(self, *exc: object) -> None:
        self._open.set()
        await self._job


async def _piled_up(spool: Spool, number: int) -> None:
    while spool._jobs.qsize() < number:  # noqa: ASYNC110  the queue tells nobody
        await asyncio.sleep(0)


async def _fill(spool: Spool) -> list[uuid.UUID]:
    """Append until the spool refuses; return what it took."""
    acked: list[uuid.UUID] = []
    while True:
        record = _record("x" * 50_000)
        try:
            await spool.append(record)
        except LogUnavailable:
            return acked
        acked.append(record.id)


async def _run(*command: str | Path) -> int:
    process = await asyncio.create_subprocess_exec(*command)
    return await process.wait()


async def test_rows_come_out_oldest_first_until_they_are_discarded(spool: Spool) -> None:
    records = [_record() for _ in range(5)]
    for record in records:
        await spool.append(record)
    rows = await spool.batch(3)
    assert [FORM.read(row.data) for row in rows] == records[:3]
    assert _ids(await spool.batch(1, after=rows[-1].seq)) == [records[3].id]
    await spool.discard(_ids(rows))
    assert _ids(await spool.batch(10)) == [record.id for record in records[3:]]
    assert await spool.depth() == 2
    assert await spool.oldest_age_s() > 0
    await spool.discard(record.id for record in records)
    assert await spool.state() == spool_module.SpoolState(depth=0, oldest_age_s=0.0, poison=0)


async def test_repeated_append_changes_nothing(spool: Spool) -> None:
    record = _record()
    await asyncio.gather(*(spool.append(record) for _ in range(10)))
    await spool.append(record)
    assert await spool.depth() == 1


async def test_appends_that_wait_share_one_transaction(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[int] = []
    transact = group_commit._transact

    def counted(connection: sqlite3.Connection, group: Sequence[Any]) -> list[Any]:
        groups.append(len(group))
        return transact(connection, group)

    monkeypatch.setattr(group_commit, "_transact", counted)
    async with Gate(spool):
        appends = [asyncio.create_task(spool.append(_record())) for _ in range(200)]
        await _piled_up(spool, 200)
    await asyncio.gather(*appends)
    assert groups == [1, 200]


async def test_cancelled_append_is_written(spool: Spool) -> None:
    record = _record()
    async with Gate(spool):
        append = asyncio.create_task(spool.append(record))
        await _piled_up(spool, 1)
        append.cancel()
        await asyncio.gather(append, return_exceptions=True)
    assert append.cancelled()
    assert _ids(await spool.batch(10)) == [record.id]


async def test_batch_is_bounded_in_bytes(spool: Spool) -> None:
    for _ in range(4):
        await spool.append(_record("x" * 2000))
    assert len(await spool.batch(10, max_bytes=1)) == 1
    assert len(await spool.batch(10, max_bytes=3000)) == 2


async def test_full_disk_fails_the_affected_appends_and_no_others(tmp_path: Path) -> None:
    spool = Spool(tmp_path, form=FORM, max_bytes=_MIB)
    await spool.open()
    small = [_record() for _ in range(20)]
    async with Gate(spool):
        appends = [asyncio.create_task(spool.append(record)) for record in small[:10]]
        big = asyncio.create_task(spool.append(_record("x" * 2 * _MIB)))
        appends += [asyncio.create_task(spool.append(record)) for record in small[10:]]
        await _piled_up(spool, 21)
    await asyncio.gather(*appends)
    with pytest.raises(LogUnavailable):
        await big
    await spool.append(last := _record())
    rows = await spool.batch(100)
    assert _ids(rows) == [record.id for record in [*small, last]]
    await spool.close()


async def test_spool_that_is_full_takes_records_again_once_drained(tmp_path: Path) -> None:
    spool = Spool(tmp_path, form=FORM, max_bytes=_MIB)
    await spool.open()
    kept = len(await _fill(spool))
    assert await spool.depth() == kept
    await spool.discard(_ids(await spool.batch(100, max_bytes=8 * _MIB)))
    for _ in range(kept):
        await spool.append(_record("x" * 50_000))
    await spool.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
async def test_file_system_without_space(tmp_path: Path) -> None:
    if await _run("mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path) != 0:
        pytest.skip("no mounts here")
    try:
        spool = Spool(tmp_path, form=FORM, min_free_bytes=_MIB)
        await spool.open()
        assert await spool.has_room()
        acked = await _fill(spool)
        assert _ids(await spool.batch(1000, max_bytes=64 * _MIB)) == acked
        assert not await spool.has_room()
        assert await _run("mount", "-o", "remount,size=8m", tmp_path) == 0
        assert await spool.has_room()
        await spool.append(record := _record("x" * 50_000))
        assert _ids(await spool.batch(1000, max_bytes=64 * _MIB)) == [*acked, record.id]
        await spool.close()
    finally:
        assert await _run("umount", "-l", tmp_path) == 0


async def test_there_is_no_room_some_way_before_the_spool_is_full(tmp_path: Path) -> None:
    spool = Spool(tmp_path, form=FORM, max_bytes=_MIB)
    await spool.open()
    assert await spool.has_room()
    while await spool.has_room():
        await spool.append(_record("x" * 10_000))
    for _ in range(3):  # those under way
        await spool.append(_record("x" * 10_000))
    await spool.discard(_ids(await spool.batch(100, max_bytes=8 * _MIB)))
    assert await spool.has_room()
    await spool.close()


async def test_there_is_no_room_where_the_disk_is_nearly_full(tmp_path: Path) -> None:
    spool = Spool(tmp_path, form=FORM, min_free_bytes=1 << 60)
    await spool.open()
    assert not await spool.has_room()
    await spool.append(_record())  # it was let in before
    await spool.close()


async def test_after_a_refusal_there_is_room_once_something_can_be_written(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy = group_commit._transact

    def fail(connection: sqlite3.Connection, group: Sequence[Any]) -> list[Any]:
        connection.execute("begin immediate")
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(group_commit, "_transact", fail)
    with pytest.raises(LogUnavailable):
        await spool.append(_record())
    with pytest.raises(LogUnavailable):
        await spool.has_room()
    monkeypatch.setattr(group_commit, "_transact", healthy)
    assert await spool.has_room()
    await spool.append(_record())


async def test_io_error_is_told_and_the_connection_replaced(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(connection: sqlite3.Connection) -> None:
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
        raise error

    async with Gate(spool):
        good = asyncio.create_task(spool.append(_record()))
        bad = asyncio.create_task(spool._do(fail))
        await _piled_up(spool, 2)
    await good
    with pytest.raises(LogUnavailable):
        await bad
    await spool.append(_record())
    assert await spool.depth() == 2


async def test_bug_in_the_thread_leaves_nobody_waiting(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(connection: sqlite3.Connection) -> None:
        raise KeyError

    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    async with Gate(spool):
        waiting = [
            asyncio.create_task(spool._do(bug)),
            asyncio.create_task(spool.append(_record())),
        ]
        await _piled_up(spool, 2)
    for task in waiting:
        with pytest.raises(LogUnavailable):
            await task
    assert spool._thread is not None
    await asyncio.to_thread(spool._thread.join)
    assert not spool.alive
    with pytest.raises(LogUnavailable):
        await spool.append(_record())


async def test_close_finishes_what_was_handed_over(tmp_path: Path) -> None:
    spool = Spool(tmp_path, form=FORM)
    await spool.open()
    appends = [asyncio.create_task(spool.append(_record())) for _ in range(50)]
    await asyncio.sleep(0)
    await spool.close()
    await asyncio.gather(*appends)
    with pytest.raises(LogUnavailable):
        await spool.append(_record())
    await spool.open()
    assert await spool.depth() == 50
    await spool.close()


async def test_files_are_private(spool: Spool) -> None:
    await spool.append(_record())
    folder = spool.path.parent
    names = {file.name for file in folder.iterdir()}
    assert names >= {"spool.sqlite3", "spool.sqlite3-wal", "spool.sqlite3-shm", "spool.lock"}
    for file in folder.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


async def test_file_is_durable_and_shrinks(spool: Spool) -> None:
    for _ in range(8):
        await spool.append(_record("x" * _MIB))
    rows = await spool.batch(100, max_bytes=64 * _MIB)
    await spool.discard(_ids(rows))

    def settings(connection: sqlite3.Connection) -> list[int | str]:
        names = ("journal_mode", "synchronous", "page_count")
        return [connection.execute(f"pragma {name}").fetchone()[0] for name in names]

    assert (await spool._do(settings))[:2] == ["wal", 2]
    # Some pages at a time, after a look that finds nothing.
    async with asyncio.timeout(30):
        while int((await spool._do(settings))[2]) >= 8 * 256 / 2:
            assert await spool.batch(100) == []


async def test_poison_is_kept_apart_and_can_come_back(spool: Spool) -> None:
    good, bad = _record(), _record("body")
    await spool.append(good)
    await spool.append(bad)
    await spool.set_aside([(bad.id, "DataError 22003")])
    assert _ids(await spool.batch(10)) == [good.id]
    assert await spool.poisoned() == [(bad.id, "DataError 22003")]
    assert (await spool.state()).poison == 1
    assert await spool.restore_poison() == 1
    assert [FORM.read(row.data) for row in await spool.batch(10)] == [good, bad]
    assert await spool.poisoned() == []


async def test_second_holder_waits_for_the_first(spool: Spool) -> None:
    await spool.append(_record())
    second = Spool(spool.path.parent, form=FORM, lock_timeout_s=60)
    opening = asyncio.create_task(second.open())
    await asyncio.sleep(0)
    assert not second.alive
    await spool.close()
    await opening
    assert await second.depth() == 1
    await second.close()


async def test_second_holder_gives_up_with_a_clear_message(spool: Spool) -> None:
    second = Spool(spool.path.parent, form=FORM, lock_timeout_s=0)
    with pytest.raises(ConfigError, match="one that no other process holds"):
        await second.open()
    await second.close()
    await spool.append(_record())


async def test_damaged_file_is_refused_and_the_lock_given_back(tmp_path: Path) -> None:
    (tmp_path / "spool.sqlite3").write_bytes(b"this is no database, nor was it one" * 100)
    for _ in range(2):
        spool = Spool(tmp_path, form=FORM, lock_timeout_s=0)
        with pytest.raises(ConfigError, match=r"a spool that can be written \(DatabaseError\)"):
            await spool.open()


_APPENDER = """
    import asyncio, sys
    from pathlib import Path
    from serve_app.accounts.sealing.master_keys import MasterKeys
    from serve_app.accounts.spool import Spool
    from serve_app.accounts.spooled import SpooledForm
    from serve_app.records import Outcome, RequestRecord, new_id, utc_now

    async def append(spool):
        while True:
            record = RequestRecord(id=new_id(), request_id="r", created_at=utc_now(), route="/",
                                   status=200, outcome=Outcome.COMPLETED, request_body="x" * 500)
            await spool.append(record)
            sys.stdout.write(f"{record.id}\\n")
            sys.stdout.flush()

    async def main():
        spool = Spool(Path(sys.argv[1]), form=SpooledForm(MasterKeys.parse(sys.argv[2])))
        await spool.open()
        await asyncio.gather(*(append(spool) for _ in range(20)))

    asyncio.run(main())
"""


async def test_acknowledged_records_survive_sigkill(tmp_path: Path) -> None:
    master = new_master_key()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(_APPENDER), tmp_path, master, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    acked = [await process.stdout.readline() for _ in range(500)]
    process.send_signal(signal.SIGKILL)
    acked += [line async for line in process.stdout if line.endswith(b"\n")]
    await process.wait()
    form = SpooledForm(MasterKeys.parse(master))
    spool = Spool(tmp_path, form=form, lock_timeout_s=0)  # the kernel gave the lock back
    await spool.open()
    rows = await spool.batch(1_000_000, max_bytes=1 << 40)
    assert {uuid.UUID(line.decode().strip()) for line in acked} <= set(_ids(rows))
    for row in rows:
        assert form.read(row.data).request_body == "x" * 500
    await spool.close()
