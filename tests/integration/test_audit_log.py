"""The audit log against a real PostgreSQL: one chain, and nothing leaves it unseen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import asyncpg
import pytest

from serve_app.audit.act import Actor, AuditAct
from serve_app.audit.chain import START, Link
from serve_app.audit.log import AuditLog
from serve_app.audit.verify import Verdict, verify
from serve_app.database import connect
from serve_app.records import new_id
from serve_app.settings import PostgresSettings
from tests.integration.conftest import PostgresServer

ANN = Actor(
    id="ann", kind="user", api_key_id=new_id(), client_address="192.0.2.7", request_id="r-1"
)
# The owner of the tables gave these up; a superuser needs no grant, but meets the triggers.
AROUND = "set session_replication_role = replica; alter table comp_ai.{} disable trigger all;"


@pytest.fixture
async def superuser(
    postgres_server: PostgresServer, database: PostgresSettings
) -> AsyncIterator[asyncpg.Connection]:
    admin = postgres_server.embedded.admin_settings()
    settings = admin.model_copy(update={"database": database.database})
    opened = await connect(settings, application_name="tests")
    yield opened
    await opened.close()


async def append(connection: asyncpg.Connection, *acts: AuditAct) -> None:
    async with connection.transaction():
        await AuditLog().append_all(connection, acts)


def act(number: int = 0, **changes: object) -> AuditAct:
    made = AuditAct(
        actor=ANN,
        action="key.update",
        target=f"key-{number}",
        before={"note": None, "models": ["a", "b"]},
        after={"note": 'naïve "quoted" \u2028 text', "models": []},
    )
    return replace(made, **changes)  # type: ignore[arg-type]


async def fill(connection: asyncpg.Connection, rows: int = 8) -> Verdict:
    await append(connection, *(act(number) for number in range(rows)))
    verdict = await verify(connection)
    assert verdict.intact
    assert verdict.rows == rows
    return verdict


async def test_an_empty_log_is_intact(connection: asyncpg.Connection) -> None:
    verdict = await verify(connection)
    assert verdict == Verdict(rows=0, head=START)


async def test_a_row_says_who_what_when_and_from_where(connection: asyncpg.Connection) -> None:
    made = act(3)
    await append(connection, made)
    row = await connection.fetchrow("select *, after::jsonb from comp_ai.audit_log")
    assert row is not None
    said = [row[name] for name in ("seq", "at", "actor_id", "actor_kind", "action", "target")]
    assert said == [1, made.at, "ann", "user", "key.update", "key-3"]
    assert (row["client_address"], row["request_id"]) == ("192.0.2.7", "r-1")
    assert row["api_key_id"] == ANN.api_key_id
    assert row["before"] == '{"models":["a","b"],"note":null}'


async def test_texts_that_postgresql_cannot_hold_are_kept_as_well_as_they_can(
    connection: asyncpg.Connection,
) -> None:
    odd = replace(ANN, id="a\x00n\ud800n", request_id=None, client_address=None, api_key_id=None)
    await append(connection, act(actor=odd, target="\x00", before=None, after={"x": "\x00"}))
    assert (await verify(connection)).intact
    kept = await connection.fetchrow("select actor_id, after from comp_ai.audit_log")
    assert tuple(kept or ()) == ("a\ufffdn?n", '{"x":"\\u0000"}')


async def test_an_act_that_is_undone_leaves_no_row(connection: asyncpg.Connection) -> None:
    await append(connection, act(1))
    undone = connection.transaction()
    await undone.start()
    await AuditLog().append(connection, act(2))
    await undone.rollback()
    await append(connection, act(3))
    targets = await connection.fetch("select target from comp_ai.audit_log order by seq")
    assert [row["target"] for row in targets] == ["key-1", "key-3"]
    assert (await verify(connection)).intact


async def test_appending_outside_a_transaction_is_refused(connection: asyncpg.Connection) -> None:
    with pytest.raises(RuntimeError, match="one transaction"):
        await AuditLog().append(connection, act())


async def test_many_at_once_make_one_unbroken_chain(
    connection: asyncpg.Connection, database: PostgresSettings
) -> None:
    async def work(worker: int) -> None:
        own = await connect(database, application_name=f"tests-{worker}")
        for number in range(20):
            rows = [act(number, target=f"{worker}/{number}/{n}") for n in range(1 + number % 3)]
            await append(own, *rows)
        await own.close()

    await asyncio.gather(*(work(worker) for worker in range(6)))
    verdict = await verify(connection)
    assert verdict.intact
    assert verdict.rows == 6 * sum(1 + number % 3 for number in range(20))
    distinct = await connection.fetchval("select count(distinct target) from comp_ai.audit_log")
    assert distinct == verdict.rows


@pytest.mark.parametrize(
    "statement",
    [
        "update comp_ai.audit_log set action = 'nothing' where seq = 2",
        "delete from comp_ai.audit_log where seq = 2",
        "truncate comp_ai.audit_log",
        "insert into comp_ai.audit_head (only_row, seq, hash) values (false, 1, '')",
        "delete from comp_ai.audit_head",
        "truncate comp_ai.audit_head",
        "update comp_ai.audit_head set seq = 1",
    ],
)
async def test_neither_the_owner_nor_a_superuser_changes_it_by_plain_sql(
    connection: asyncpg.Connection, superuser: asyncpg.Connection, statement: str
) -> None:
    before = await fill(connection)
    await superuser.execute("set session_replication_role = replica")
    for session in (connection, superuser):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await session.execute(statement)
    assert await verify(connection) == before


INSERT = (
    "insert into comp_ai.audit_log select {}, at, recorded_at, actor_id, actor_kind, api_key_id, "
    "action, target, before, after, client_address, request_id, previous_hash, hash "
    "from comp_ai.audit_log where seq = {}"
)
# What a superuser does, and what is said of which row.
TAMPERING = {
    "changed": ("update comp_ai.audit_log set target = 'key-9' where seq = 4", {"4 changed"}),
    "another time": (
        "update comp_ai.audit_log set at = at - interval '1 microsecond' where seq = 4",
        {"4 changed"},
    ),
    "a space in the JSON": (
        "update comp_ai.audit_log set after = after || ' ' where seq = 4",
        {"4 changed"},
    ),
    "null for a text": (
        "update comp_ai.audit_log set request_id = null where seq = 4",
        {"4 changed"},
    ),
    "another hash": (
        "update comp_ai.audit_log set hash = sha256('x') where seq = 4",
        {"4 changed", "5 unlinked"},
    ),
    "one deleted": ("delete from comp_ai.audit_log where seq = 4", {"4 missing"}),
    "the first deleted": ("delete from comp_ai.audit_log where seq = 1", {"1 missing"}),
    "some deleted": (
        "delete from comp_ai.audit_log where seq in (3, 4, 6)",
        {"3 missing", "6 missing"},
    ),
    "the tail deleted": ("delete from comp_ai.audit_log where seq > 5", {"6 missing"}),
    "all deleted": ("delete from comp_ai.audit_log", {"1 missing"}),
    "deleted and numbered anew": (
        "delete from comp_ai.audit_log where seq = 4; "
        "update comp_ai.audit_log set seq = seq - 1 where seq > 4",
        {"4 unlinked", "4 changed", "5 changed", "6 changed", "7 changed", "8 missing"},
    ),
    "one copied to the end": (
        INSERT.format(9, 8),
        {"9 unlinked", "9 changed", "9 beyond_head"},
    ),
    "one put before": (INSERT.format(0, 1), {"0 unlinked", "0 changed", "1 unlinked"}),
    "two swapped": (
        "update comp_ai.audit_log set seq = -1 where seq = 3; "
        "update comp_ai.audit_log set seq = 3 where seq = 6; "
        "update comp_ai.audit_log set seq = 6 where seq = -1",
        {f"{seq} {kind}" for seq in (3, 6) for kind in ("unlinked", "changed")}
        | {"4 unlinked", "7 unlinked"},
    ),
}


@pytest.mark.parametrize("name", TAMPERING)
async def test_tampering_is_found(
    connection: asyncpg.Connection, superuser: asyncpg.Connection, name: str
) -> None:
    await fill(connection)
    statements, expected = TAMPERING[name]
    await superuser.execute(AROUND.format("audit_log") + statements)
    verdict = await verify(connection)
    assert {f"{fault.seq} {fault.kind}" for fault in verdict.faults} == expected


async def test_a_head_that_was_moved_is_found(
    connection: asyncpg.Connection, superuser: asyncpg.Connection
) -> None:
    await fill(connection)
    await superuser.execute(
        AROUND.format("audit_head") + "update comp_ai.audit_head set hash = sha256('x')"
    )
    verdict = await verify(connection)
    assert [fault.kind for fault in verdict.faults] == ["head"]


async def test_what_is_appended_after_a_cut_does_not_cover_it(
    connection: asyncpg.Connection, superuser: asyncpg.Connection
) -> None:
    await fill(connection)
    await superuser.execute(
        AROUND.format("audit_log") + "delete from comp_ai.audit_log where seq > 6"
    )
    await append(connection, act(99))
    verdict = await verify(connection)
    assert [(fault.seq, fault.kind.value) for fault in verdict.faults] == [(7, "missing")]


async def test_a_log_that_was_cut_and_its_head_set_back_is_found_by_a_checkpoint(
    connection: asyncpg.Connection, superuser: asyncpg.Connection
) -> None:
    checkpoint = (await fill(connection)).head
    await superuser.execute(
        AROUND.format("audit_log")
        + AROUND.format("audit_head")
        + "delete from comp_ai.audit_log where seq > 5;"
        "update comp_ai.audit_head h set seq = 5, hash = l.hash "
        "from comp_ai.audit_log l where l.seq = 5"
    )
    assert (await verify(connection)).intact
    found = (await verify(connection, checkpoint)).faults
    assert [(fault.seq, fault.kind.value) for fault in found] == [(8, "checkpoint")]
    # Written anew to the same length, it has other hashes.
    await append(connection, *(act(number) for number in range(20, 24)))
    assert (await verify(connection)).intact
    found = (await verify(connection, checkpoint)).faults
    assert [(fault.seq, fault.kind.value) for fault in found] == [(8, "checkpoint")]


async def test_a_checkpoint_holds_while_the_log_grows(connection: asyncpg.Connection) -> None:
    checkpoint = (await fill(connection)).head
    await append(connection, act(9))
    assert (await verify(connection, checkpoint)).intact
    assert not (await verify(connection, Link(checkpoint.seq, bytes(32)))).intact
