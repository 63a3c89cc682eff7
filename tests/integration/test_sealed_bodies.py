"""Bodies lie sealed in PostgreSQL and in the spool, and open again for who has the keys."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from serve_app.accounts import writer
from serve_app.accounts.bodies import Body, open_bodies
from serve_app.accounts.metrics import NoMetrics
from serve_app.accounts.request_log import LogConfig, RequestLog
from serve_app.accounts.sealing.aead import SealBroken
from serve_app.accounts.sealing.master_keys import MasterKeyMissing, MasterKeys, new_master_key
from serve_app.accounts.sealing.rotation import rotate, wrapped_by
from serve_app.accounts.sealing.subject_keys import SubjectKeys, Text
from serve_app.accounts.spool import Spool
from serve_app.accounts.spooled import SpooledForm
from serve_app.audit.act import Actor
from serve_app.audit.verify import verify
from serve_app.database import connect
from serve_app.records import Outcome, RequestRecord, new_id, utc_now
from serve_app.settings import PostgresSettings
from tests.sealing import FORM, MASTERS, subject_keys

MARKER = "MARKER-OF-A-TEXT"
_TIMEOUT_S = 60.0
_BODIES = "select id, request_body, response_text, key_id, sealed from comp_ai.request_bodies"


def record(subject: str | None = "ann", **changes: Any) -> RequestRecord:
    return RequestRecord(
        id=new_id(),
        request_id="r",
        created_at=utc_now(),
        route="chat.completions",
        status=200,
        outcome=Outcome.COMPLETED,
        principal_id=subject,
        **{"request_body": f"{MARKER} ask", "response_text": f"{MARKER} answer", **changes},
    )


@asynccontextmanager
async def log_at(
    folder: Path, postgres: PostgresSettings, masters: MasterKeys = MASTERS
) -> AsyncIterator[RequestLog]:
    log = RequestLog(
        spool=Spool(folder, form=SpooledForm(masters)),
        postgres=postgres,
        keys=SubjectKeys(masters),
        metrics=NoMetrics(),
        config=LogConfig(backoff_first_s=0.01, backoff_most_s=0.1),
    )
    await log.start()
    try:
        yield log
    finally:
        await log.close()


@pytest.fixture
async def connection(connection: asyncpg.Connection) -> asyncpg.Connection:
    await writer.prepare_session(connection)
    return connection


async def write(connection: asyncpg.Connection, *records: RequestRecord) -> None:
    report = await writer.write(connection, records, subject_keys())
    assert report.poison == []


async def opened(
    connection: asyncpg.Connection, keys: SubjectKeys | None = None
) -> dict[uuid.UUID, Body | None]:
    rows = await connection.fetch(_BODIES)
    bodies = await open_bodies(connection, keys or subject_keys(), rows)
    return dict(zip([uuid.UUID(int=row["id"].int) for row in rows], bodies, strict=True))


async def everything_in(connection: asyncpg.Connection) -> str:
    """Return all rows of all our tables, as PostgreSQL writes them."""
    tables = await connection.fetch(
        "select format('%I.%I', schemaname, tablename) as name from pg_tables "
        "where schemaname in ('comp_ai', 'comp_ai_keys')"
    )
    texts = [
        await connection.fetchval(f"select string_agg(t::text, '') from {table['name']} as t")
        for table in tables
    ]
    return "".join(text or "" for text in texts)


def bytes_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.iterdir())


def holds(text: str, marker: str) -> bool:
    return marker in text or marker.encode().hex() in text


async def test_no_text_lies_in_the_clear_in_postgresql(connection: asyncpg.Connection) -> None:
    one = record()
    await write(connection, one)
    everything = await everything_in(connection)
    assert str(one.id) in everything
    assert not holds(everything, MARKER)
    assert await opened(connection) == {
        one.id: Body(request=f"{MARKER} ask", response=f"{MARKER} answer")
    }
    row = await connection.fetchrow("select * from comp_ai.requests_plain")
    assert (row["request_text"], row["response_text"], row["user_id"]) == (None, None, "ann")


async def test_no_text_lies_in_the_clear_in_the_spool(
    tmp_path: Path, database: PostgresSettings
) -> None:
    away = database.model_copy(update={"host": "/nonexistent"})
    good, bad = record(), record(prompt_tokens=-1)
    async with log_at(tmp_path, away) as log:
        await log.append(good)
        await log.append(bad)
        raw = bytes_in(tmp_path)
    assert str(good.id).encode() in raw
    assert MARKER.encode() not in raw
    async with log_at(tmp_path, database) as log:
        assert await log.drain(_TIMEOUT_S)
        assert (await log.status()).poison_total == 1
    # What was set aside stays, and the WAL may hold what was deleted.
    raw = bytes_in(tmp_path)
    assert str(bad.id).encode() in raw
    assert MARKER.encode() not in raw


async def test_a_row_of_the_time_before_is_drained_and_sealed(
    tmp_path: Path, database: PostgresSettings, connection: asyncpg.Connection
) -> None:
    spool = Spool(tmp_path, form=FORM)
    await spool.open()
    await spool.append(one := record())
    await spool._do(lambda con: con.execute("update spool set data = ?", (one.to_json(),)).rowcount)
    await spool.close()
    async with log_at(tmp_path, database) as log:
        assert await log.drain(_TIMEOUT_S)
    assert not holds(await everything_in(connection), MARKER)
    assert (await opened(connection))[one.id] is not None


async def test_a_body_of_the_time_before_is_read(connection: asyncpg.Connection) -> None:
    old, new = new_id(), record()
    await connection.execute(
        "insert into comp_ai.request_bodies (id, created_at, request_body, response_text) "
        "values ($1, now(), 'ask', 'answer')",
        old,
    )
    await write(connection, new)
    bodies = await opened(connection)
    assert bodies[old] == Body(request="ask", response="answer")
    assert bodies[new.id] is not None


async def test_each_subject_has_one_key_however_many_write(database: PostgresSettings) -> None:
    connections = [await connect(database, application_name="tests") for _ in range(4)]
    for one in connections:
        await writer.prepare_session(one)
    subjects = [*(f"subject-{number}" for number in range(20)), None]

    async def drain(one: asyncpg.Connection, order: Sequence[str | None]) -> None:
        for _ in range(5):
            await write(one, *(record(subject) for subject in order))

    orders = [subjects, subjects[::-1], subjects[10:] + subjects[:10], subjects[5:]]
    await asyncio.gather(*map(drain, connections, orders))
    counts = await connections[0].fetch(
        "select kind, count(*) as keys, count(distinct subject) as subjects "
        "from comp_ai_keys.subject_keys group by kind order by kind"
    )
    assert [tuple(row) for row in counts] == [("service", 1, 1), ("subject", 20, 20)]
    bodies = await opened(connections[0])
    assert len(bodies) == 5 * (3 * 21 + 16)
    assert None not in bodies.values()
    for one in connections:
        await one.close()


async def test_a_destroyed_key_opens_nothing_and_is_never_used_again(
    connection: asyncpg.Connection,
) -> None:
    keys = subject_keys()
    before, other = record(), record("bob")
    await writer.write(connection, [before, other], keys)
    assert await keys.destroy(connection, "ann") == 1
    assert await keys.destroy(connection, "ann") == 0
    after = record()
    await writer.write(connection, [after], keys)  # it remembers the destroyed key
    bodies = await opened(connection, keys)
    assert bodies[before.id] is None
    assert None not in (bodies[other.id], bodies[after.id])
    assert await opened(connection) == bodies


async def test_an_erasure_waits_for_what_is_being_written(database: PostgresSettings) -> None:
    writing = await connect(database, application_name="tests")
    erasing = await connect(database, application_name="tests")
    keys = subject_keys()
    async with writing.transaction():
        (first,) = await keys.seal(writing, [Text("ann", b"here", b"text")])
    async with writing.transaction():
        (second,) = await keys.seal(writing, [Text("ann", b"here", b"text")])
        erasure = asyncio.create_task(keys.destroy(erasing, "ann"))
        await _waits_for_a_lock(writing)
        assert not erasure.done()
    assert await erasure == 1
    assert first.key_id == second.key_id
    assert await keys.open(writing, [first, second]) == [None, None]
    await writing.close()
    await erasing.close()


async def _waits_for_a_lock(connection: asyncpg.Connection) -> None:
    waiting = "select count(*) from pg_locks where not granted"
    async with asyncio.timeout(_TIMEOUT_S):
        while not await connection.fetchval(waiting):
            pass  # each look is a round trip


async def test_a_body_put_into_another_row_does_not_open(connection: asyncpg.Connection) -> None:
    one, other = record(), record()
    await write(connection, one, other)
    await connection.execute(
        "update comp_ai.request_bodies set sealed = "
        "(select sealed from comp_ai.request_bodies where id = $1) where id = $2",
        one.id,
        other.id,
    )
    with pytest.raises(SealBroken):
        await opened(connection)


async def test_a_key_given_to_another_subject_does_not_open(connection: asyncpg.Connection) -> None:
    await write(connection, record())
    await connection.execute("update comp_ai_keys.subject_keys set subject = 'eve'")
    with pytest.raises(SealBroken):
        await opened(connection)


# Rotation.


async def test_rotation_wraps_the_keys_anew_and_leaves_the_texts(
    connection: asyncpg.Connection,
) -> None:
    old, new = new_master_key(), new_master_key()
    before, both, after = map(MasterKeys.parse, (old, f"{new},{old}", new))
    keys = SubjectKeys(before)
    written = [record(f"subject-{number}") for number in range(7)]
    await writer.write(connection, written, keys)
    sealed = await connection.fetch(_BODIES)
    with pytest.raises(MasterKeyMissing, match=before.current_id):
        await opened(connection, SubjectKeys(after))
    assert await rotate(connection, both, Actor.operator(), batch_rows=3) == 7
    assert await rotate(connection, both, Actor.operator()) == 0
    assert await wrapped_by(connection) == {after.current_id: 7}
    bodies = await opened(connection, SubjectKeys(after))
    assert bodies.keys() == {one.id for one in written}
    assert None not in bodies.values()
    assert await connection.fetch(_BODIES) == sealed
    acts = await connection.fetch(
        "select target, (after::jsonb->>'keys')::int as keys from comp_ai.audit_log "
        "where action = 'master_key.rotate' order by seq"
    )
    assert [tuple(act) for act in acts] == [(after.current_id, n) for n in (3, 3, 1)]
    assert (await verify(connection)).intact


async def test_rotation_says_which_master_key_it_lacks(connection: asyncpg.Connection) -> None:
    old, new = MasterKeys.parse(new_master_key()), MasterKeys.parse(new_master_key())
    await writer.write(connection, [record()], SubjectKeys(old))
    with pytest.raises(MasterKeyMissing, match=f"{old.current_id} is not among"):
        await rotate(connection, new, Actor.operator())


async def test_records_wait_in_the_spool_for_a_master_key_that_is_missing(
    tmp_path: Path, database: PostgresSettings, connection: asyncpg.Connection
) -> None:
    old, new = new_master_key(), new_master_key()
    await writer.write(connection, [record()], SubjectKeys(MasterKeys.parse(old)))
    async with log_at(tmp_path, database, MasterKeys.parse(new)) as log:
        await log.append(one := record())
        async with asyncio.timeout(_TIMEOUT_S):
            while (status := await log.status()).last_error != "MasterKeyMissing":
                pass  # each status is a turn of the spool's thread
        assert (status.depth, status.poison_total) == (1, 0)
    both = MasterKeys.parse(f"{new},{old}")
    async with log_at(tmp_path, database, both) as log:
        assert await log.drain(_TIMEOUT_S)
    assert (await opened(connection, SubjectKeys(both)))[one.id] is not None


async def test_a_key_of_the_service_stays_the_same(connection: asyncpg.Connection) -> None:
    old, new = new_master_key(), new_master_key()
    async with connection.transaction():
        first = await SubjectKeys(MasterKeys.parse(old)).service_key(connection, "erasures")
        other = await SubjectKeys(MasterKeys.parse(old)).service_key(connection, "signatures")
    await rotate(connection, MasterKeys.parse(f"{new},{old}"), Actor.operator())
    async with connection.transaction():
        again = await SubjectKeys(MasterKeys.parse(new)).service_key(connection, "erasures")
    assert first == again != other
    assert len(first) == 32


# What the policy says of a record.


async def test_a_record_is_redacted_before_it_is_sealed(
    tmp_path: Path, database: PostgresSettings, connection: asyncpg.Connection
) -> None:
    asked = '{"prompt": "Write to ada@example.org"}'
    good = record(bodies="redacted", request_body=asked, response_text="b@example.org wrote")
    bad = record(bodies="redacted", request_body="{broken", response_text="b@example.org wrote")
    async with log_at(tmp_path, database) as log:
        await log.append(good)
        await log.append(bad)
        assert await log.drain(_TIMEOUT_S)
    assert await opened(connection) == {
        good.id: Body(request='{"prompt":"Write to [EMAIL]"}', response="[EMAIL] wrote")
    }
    words = await connection.fetch("select id, bodies from comp_ai.requests")
    assert {str(row["id"]): row["bodies"] for row in words} == {
        str(good.id): "redacted",
        str(bad.id): "metadata",
    }
