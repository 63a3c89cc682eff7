"""Erasing a person: from every place, resumed where it broke off, and not brought back."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import asyncpg
import orjson
import pytest

from serve_app.accounts.bodies import open_bodies
from serve_app.accounts.sealing.master_keys import (
    MasterKeyMissing,
    MasterKeys,
    NoMasterKey,
    new_master_key,
)
from serve_app.accounts.sealing.rotation import rotate
from serve_app.audit.act import Actor
from serve_app.audit.verify import verify as verify_audit
from serve_app.errors import InvalidRequest, NotFound, UnderLegalHold
from serve_app.records import utc_now
from serve_app.subjects import report
from serve_app.subjects.erasing import Eraser, reapply_erasures
from serve_app.subjects.holds import list_holds, release_hold, set_hold
from tests.integration.people import marker, names_of, places_of, plant, record, write
from tests.sealing import MASTERS, subject_keys

BY = Actor(id="ops@host", kind="operator")
# Odd on purpose: limits write it in another way, and a path must be told from an end.
ANN = "ann:müller/x"
BEN = "ben"
TOTALS = """
select (select count(*) from comp_ai.requests) as requests,
       (select sum(prompt_tokens + completion_tokens) from comp_ai.requests) as tokens,
       (select sum(cost_micros) from comp_ai.requests) as cost,
       (select sum(requests) from comp_ai.usage_pending) as pending,
       (select sum(prompt_tokens) from comp_ai.usage_minute) as minute,
       (select sum(cost_micros) from comp_ai.usage_hour) as hour,
       (select sum(completion_tokens) from comp_ai.usage_day) as day,
       (select sum(tokens) from comp_ai.limit_usage) as limits
"""


async def totals(connection: asyncpg.Connection) -> dict[str, Any]:
    row = await connection.fetchrow(TOTALS)
    assert row is not None
    return dict(row)


async def erase(connection: asyncpg.Connection, subject: str = ANN) -> Mapping[str, Any]:
    eraser = Eraser(connection, MASTERS, batch_rows=1)
    return report.signed_report(await eraser.erase(subject, BY), MASTERS)["report"]


async def texts(connection: asyncpg.Connection) -> list[str | None]:
    rows = await connection.fetch("select * from comp_ai.request_bodies order by created_at, id")
    opened = await open_bodies(connection, subject_keys(), rows)
    return [None if body is None else body.request for body in opened]


async def test_nothing_but_the_audit_log_names_who_was_erased(
    connection: asyncpg.Connection,
) -> None:
    await plant(connection, ANN)
    await plant(connection, BEN)
    before, of_ben = await totals(connection), await places_of(connection, BEN, marker(BEN))
    planted = await places_of(connection, *names_of(ANN))
    assert set(planted) == {
        "api_keys", "audit_log", "batch_lines", "batches", "file_chunks", "files",
        "idempotency_keys", "legal_holds", "limit_usage", "request_bodies", "requests",
        "responses", "subject_keys", "usage_day", "usage_hour", "usage_minute", "usage_pending",
    }  # fmt: skip

    done = await erase(connection)

    assert await places_of(connection, *names_of(ANN)) == {"audit_log": 1}
    assert await totals(connection) == before
    assert await places_of(connection, BEN, marker(BEN)) == of_ben
    assert done["still_named"] == {"audit_log": 1}
    assert done["keys_destroyed"] == 1
    assert done["found"]["requests"] == done["pseudonymised"]["requests"] == 3
    assert done["found"]["limit_usage"] == done["pseudonymised"]["limit_usage"] == 3
    renamed = await connection.fetch(
        "select distinct principal_id, client_address from comp_ai.requests "
        "where principal_id <> $1", BEN,
    )  # fmt: skip
    assert [tuple(row) for row in renamed] == [(done["pseudonym"], None)]
    assert (await verify_audit(connection)).intact


async def test_its_keys_are_revoked(connection: asyncpg.Connection) -> None:
    await plant(connection, ANN)
    done = await erase(connection)
    row = await connection.fetchrow("select * from comp_ai.api_keys where owner <> 'another'")
    assert row is not None
    assert (row["owner"], row["name"], row["note"]) == (done["pseudonym"], None, None)
    assert row["revoked_at"] is not None
    others = "select revoked_at from comp_ai.api_keys where owner = 'another'"
    assert await connection.fetchval(others) is None


@pytest.mark.parametrize("broken_at", [0, "requests", "usage_hour", "limit_usage"])
async def test_an_erasure_that_breaks_off_goes_on(
    connection: asyncpg.Connection, broken_at: str | int
) -> None:
    class Killed(Exception):
        pass

    class Breaking(Eraser):
        async def _repeat(self, step: str, *more: Any) -> int:
            if step == broken_at or not broken_at:
                raise Killed
            return await super()._repeat(step, *more)

    await plant(connection, ANN)
    before = await totals(connection)
    with pytest.raises(Killed):
        await Breaking(connection, MASTERS).erase(ANN, BY)
    assert await connection.fetchval("select count(*) from comp_ai_keys.erasures") == 1
    # It comes back meanwhile, and is somebody again: that is not touched.
    await write(connection, record(ANN))
    done = await erase(connection)
    assert done["resumed"]
    assert done["keys_destroyed"] == 0
    after = await totals(connection)
    assert after["limits"] == before["limits"]
    assert after["requests"] == before["requests"] + 1
    assert await connection.fetchval("select count(*) from comp_ai_keys.erasures") == 1
    assert await texts(connection) == [f"{marker(ANN)} ask"]
    own = "select count(*) from comp_ai.requests where principal_id = $1"
    assert await connection.fetchval(own, ANN) == 1


async def test_the_id_of_a_trace_goes(connection: asyncpg.Connection) -> None:
    """A client may have made it, as it may the id of a request."""
    header = f"00-{'4f' * 16}-{'5a' * 8}-01"
    late = record(ANN, traceparent=header)
    await write(connection, record(ANN, traceparent=header), record(BEN, traceparent=header))
    await erase(connection)
    await write(connection, late)
    kept = await connection.fetch(
        "select principal_id from comp_ai.requests where trace_id = $1", "4f" * 16
    )
    assert [row["principal_id"] for row in kept] == [BEN]


async def test_records_that_come_late_lose_name_and_text(connection: asyncpg.Connection) -> None:
    of_before = record(ANN, request_id=ANN)
    await write(connection, record(BEN))
    done = await erase(connection)
    await write(connection, of_before, record(BEN), record(None, request_id="r"))
    assert await places_of(connection, ANN, marker(ANN)) == {}
    late = await connection.fetchrow("select * from comp_ai.requests where id = $1", of_before.id)
    assert late is not None
    assert late["principal_id"] == done["pseudonym"]
    assert late["prompt_tokens"] == of_before.prompt_tokens
    # Who comes back is stored under its own name, with a new key.
    await write(connection, record(ANN))
    assert (await texts(connection))[-1] == f"{marker(ANN)} ask"
    second = await erase(connection)
    assert second["pseudonym"] != done["pseudonym"]
    assert not second["resumed"]
    # The older of the two holds for what is older.
    await write(
        connection, record(ANN, of_before.created_at), record(ANN, utc_now() - timedelta(1))
    )
    under = "select count(*) from comp_ai.requests where principal_id = $1"
    assert await connection.fetchval(under, done["pseudonym"]) == 3
    assert await connection.fetchval(under, second["pseudonym"]) == 1


async def test_a_restored_backup_does_not_bring_the_text_of_one_of_1000_back(
    connection: asyncpg.Connection,
) -> None:
    people = [f"person-{number:04}" for number in range(999)]
    await write(connection, *(record(person) for person in [*people, ANN]))
    await plant(connection, ANN)
    await connection.execute("create schema backup")
    tables = [row["name"] for row in await connection.fetch(_TABLES)]
    for table in tables:
        await connection.execute(f"create table backup.{table} as select * from comp_ai.{table}")
    before = await totals(connection)
    done = await erase(connection)

    for table in reversed(tables):
        await connection.execute(f"delete from comp_ai.{table}")
    for table in tables:
        await connection.execute(
            f"insert into comp_ai.{table} overriding system value select * from backup.{table}"
        )
    await connection.execute("truncate comp_ai.usage_pending")
    await connection.execute(
        "insert into comp_ai.usage_pending overriding system value "
        "select * from backup.usage_pending"
    )

    rows = await connection.fetch(
        "select b.* from comp_ai.request_bodies b join comp_ai.requests r using (id, created_at) "
        "where b.sealed is not null and r.principal_id = $1", ANN,
    )  # fmt: skip
    assert len(rows) == 3
    assert await open_bodies(connection, subject_keys(), rows) == [None] * 3
    others = await connection.fetch(
        "select b.* from comp_ai.request_bodies b join comp_ai.requests r using (id, created_at) "
        "where r.principal_id <> $1", ANN,
    )  # fmt: skip
    opened = await open_bodies(connection, subject_keys(), others)
    assert len([body for body in opened if body is not None]) == 999

    assert await reapply_erasures(connection, MASTERS) == 1
    assert await places_of(connection, *names_of(ANN)) == {"audit_log": 1}
    assert await totals(connection) == before
    under = "select count(*) from comp_ai.requests where principal_id = $1"
    assert await connection.fetchval(under, done["pseudonym"]) == 4
    assert await reapply_erasures(connection, MASTERS) == 0


_TABLES = """
select relname as name from pg_class
where relnamespace = 'comp_ai'::regnamespace and relkind in ('r', 'p') and not relispartition
  and relname not in ('audit_log', 'audit_head', 'schema_migrations') order by oid
"""


async def test_an_erasure_is_known_after_the_master_key_was_changed(
    connection: asyncpg.Connection,
) -> None:
    old, new = new_master_key(), new_master_key()
    of_before = record(ANN, request_body=None, response_text=None)
    await Eraser(connection, MasterKeys.parse(old)).erase(ANN, BY)
    await rotate(connection, MasterKeys.parse(f"{new},{old}"), BY)
    await connection.execute(
        "insert into comp_ai.requests (id, created_at, request_id, route, status, outcome, "
        "principal_id) values ($1, $2, 'r', 'r', 200, 'completed', $3)",
        of_before.id, of_before.created_at, ANN,
    )  # fmt: skip
    assert await reapply_erasures(connection, MasterKeys.parse(new)) == 1
    assert await places_of(connection, ANN) == {}


async def test_a_legal_hold_refuses_it_and_changes_nothing(connection: asyncpg.Connection) -> None:
    await plant(connection, ANN)
    held = await set_hold(connection, ANN, "a case", BY)
    with pytest.raises(InvalidRequest):
        await set_hold(connection, ANN, "another case", BY)
    before = await places_of(connection, ANN, marker(ANN))
    with pytest.raises(UnderLegalHold):
        await erase(connection)
    assert await places_of(connection, ANN, marker(ANN)) == before
    assert [hold.id for hold in await list_holds(connection)] == [held.id]
    await release_hold(connection, ANN, BY)
    with pytest.raises(NotFound):
        await release_hold(connection, ANN, BY)
    assert await list_holds(connection) == []
    await erase(connection)
    acts = await connection.fetch("select action from comp_ai.audit_log order by seq")
    assert [row["action"] for row in acts][1:] == [
        "subject.hold", "subject.release", "subject.erase", "subject.erased",
    ]  # fmt: skip


async def test_without_a_master_key_nothing_is_begun(connection: asyncpg.Connection) -> None:
    await write(connection, record(ANN))
    with pytest.raises(NoMasterKey):
        await Eraser(connection, MasterKeys([])).erase(ANN, BY)
    assert await connection.fetchval("select count(*) from comp_ai_keys.erasures") == 0


async def test_the_report_is_signed(connection: asyncpg.Connection) -> None:
    erased = await Eraser(connection, MASTERS).erase(ANN, BY)
    signed = report.signed_report(erased, MASTERS)
    data = orjson.dumps(signed, option=orjson.OPT_INDENT_2)
    assert report.verify(data, MASTERS)["subject"] == ANN
    with pytest.raises(MasterKeyMissing):
        report.verify(data, MasterKeys.parse(new_master_key()))
    for wrong in (data.replace(b'"resumed": false', b'"resumed": true'), b"{}", b"no", b"[]"):
        with pytest.raises(report.ReportInvalid):
            report.verify(wrong, MASTERS)
    # A report that somebody else signed names their key in ours's place.
    signed["signature"]["public_key"] = "AAAA"
    with pytest.raises(report.ReportInvalid):
        report.verify(orjson.dumps(signed), MASTERS)


async def test_every_column_that_may_name_a_subject_is_known(
    connection: asyncpg.Connection,
) -> None:
    """A column that a later migration adds must be erased, or stand here with the reason."""
    rows = await connection.fetch(
        "select table_name || '.' || column_name as name from information_schema.columns c "
        "where table_schema in ('comp_ai', 'comp_ai_keys') "
        "and table_name !~ '_(default|y\\d{4}m\\d\\d)$' "
        "and column_name ~ '(principal|owner|subject|actor|user|_by$|account$|address)' "
        "and data_type <> 'timestamp with time zone' order by 1"
    )
    assert [row["name"] for row in rows] == [
        "api_keys.created_by",
        "api_keys.owner",
        "api_keys.replaced_by",  # the id of a key
        "audit_log.actor_id",  # stays: append-only
        "audit_log.actor_kind",
        "audit_log.client_address",
        "batches.owner",
        "batches.principal",
        "files.owner",
        "idempotency_keys.owner",  # a random token
        "idempotency_keys.principal_id",
        "legal_holds.released_by",
        "legal_holds.set_by",
        "legal_holds.subject",
        "limit_usage.account",
        "requests.client_address",
        "requests.principal_id",
        "requests.principal_kind",
        "requests_plain.user_id",  # a view
        "responses.principal_id",
        "subject_keys.subject",
        "usage_day.principal_id",
        "usage_hour.principal_id",
        "usage_minute.principal_id",
        "usage_pending.principal_id",
    ]
