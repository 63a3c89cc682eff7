"""Retention: whole months go, what is held stays, and nobody waits."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import asyncpg

from serve_app.accounts import writer
from serve_app.accounts.bodies import Body, open_bodies
from serve_app.accounts.retention.keeping import Expired, apply, expired
from serve_app.accounts.retention.policy import DataClass, Keep, RetentionPolicy
from serve_app.accounts.retention.task import retention_task
from serve_app.audit.act import Actor
from serve_app.database import connect
from serve_app.lazy_pool import build_pool
from serve_app.records import Outcome, PrincipalKind, RequestRecord, new_id, utc_now
from serve_app.settings import PostgresSettings
from serve_app.stored.sweeper import Sweeper
from tests.integration.command_line import comp_ai
from tests.integration.people import plant
from tests.sealing import subject_keys

_OLD = datetime(2024, 3, 10, tzinfo=UTC)
_OLDER = datetime(2024, 2, 10, tzinfo=UTC)
_POLICY = RetentionPolicy(requests=Keep(months=13))


def record(
    created_at: datetime, principal: str = "ann", body: str | None = "text"
) -> RequestRecord:
    return RequestRecord(
        id=new_id(),
        request_id="r",
        created_at=created_at,
        route="chat.completions",
        status=200,
        outcome=Outcome.COMPLETED,
        principal_id=principal,
        principal_kind=PrincipalKind.USER,
        request_body=body,
        response_text=body,
    )


async def fill(connection: asyncpg.Connection, *records: RequestRecord) -> None:
    await connection.execute("select comp_ai.ensure_request_partitions('2024-02-01', 2)")
    await connection.execute("select comp_ai.ensure_request_partitions(now()::date, 1)")
    await writer.prepare_session(connection)
    await writer.write(connection, records, subject_keys())


async def run(connection: asyncpg.Connection, policy: RetentionPolicy = _POLICY) -> list[Expired]:
    return [done async for done in apply(connection, policy)]


async def hold(connection: asyncpg.Connection, subject: str) -> None:
    await connection.execute(
        "insert into comp_ai.legal_holds (id, subject, reason, set_by) "
        "values (gen_random_uuid(), $1, 'a case', 'the tests')",
        subject,
    )


async def release(connection: asyncpg.Connection) -> None:
    await connection.execute(
        "update comp_ai.legal_holds set released_at = now(), released_by = 'x'"
    )


async def whose(connection: asyncpg.Connection) -> list[tuple[str, bool]]:
    rows = await connection.fetch(
        "select principal_id, b.id is not null as body from comp_ai.requests r "
        "left join comp_ai.request_bodies b using (id, created_at) order by r.created_at, r.id"
    )
    return [tuple(row) for row in rows]


async def months(connection: asyncpg.Connection) -> list[str]:
    rows = await connection.fetch(
        "select relname from pg_class where relname ~ '^request(s|_bodies)_y2024' and relkind = 'r'"
        " order by 1"
    )
    return [row["relname"] for row in rows]


def short(found: Sequence[Expired]) -> list[tuple[str, str, int, int]]:
    return [(e.data.value, e.partition.partition(".")[2], e.rows, e.held_rows) for e in found]


async def test_months_that_are_past_go_and_the_others_stay(
    connection: asyncpg.Connection,
) -> None:
    await fill(connection, record(_OLDER), record(_OLD), record(_OLD, "ben"), record(utc_now()))
    everything = [
        ("bodies", "request_bodies_y2024m02", 1, 0),
        ("bodies", "request_bodies_y2024m03", 2, 0),
        ("requests", "requests_y2024m02", 1, 0),
        ("requests", "requests_y2024m03", 2, 0),
    ]
    assert short(await expired(connection, _POLICY)) == everything
    assert len(await whose(connection)) == 4  # a look changes nothing
    assert short(await run(connection)) == everything
    assert await whose(connection) == [("ann", True)]
    assert await months(connection) == []
    assert await run(connection) == []
    acts = await connection.fetch("select actor_id, action, target from comp_ai.audit_log")
    assert [row["target"].partition(".")[2] for row in acts] == [name for _, name, *_ in everything]
    assert {(row["actor_id"], row["action"]) for row in acts} == {("retention", "retention.drop")}


async def test_a_month_goes_only_when_all_of_it_is_past(connection: asyncpg.Connection) -> None:
    await fill(connection, record(utc_now()))
    # Its first days may be older than that, its last are not.
    done = await run(connection, RetentionPolicy(requests=Keep(days=1)))
    assert all("2024" in removed.partition for removed in done)
    assert await whose(connection) == [("ann", True)]


async def test_nothing_set_removes_nothing(connection: asyncpg.Connection) -> None:
    await fill(connection, record(_OLD))
    assert await run(connection, RetentionPolicy()) == []
    assert await expired(connection, RetentionPolicy()) == []


async def test_bodies_may_go_earlier(connection: asyncpg.Connection) -> None:
    await fill(connection, record(_OLD))
    done = await run(connection, RetentionPolicy(bodies=Keep(days=30)))
    assert ("bodies", "request_bodies_y2024m03", 1, 0) in short(done)
    assert await whose(connection) == [("ann", False)]


async def test_what_is_held_stays_where_it_is_found_until_the_release(
    connection: asyncpg.Connection,
) -> None:
    await fill(connection, record(_OLD), record(_OLD, "ben"), record(_OLD, "cy"))
    await hold(connection, "ben")
    done = short(await run(connection))
    assert ("requests", "requests_y2024m03", 2, 1) in done
    assert ("bodies", "request_bodies_y2024m03", 2, 1) in done
    assert await whose(connection) == [("ben", True)]
    assert await connection.fetchval("select user_id from comp_ai.requests_plain") == "ben"
    rows = await connection.fetch("select * from comp_ai.request_bodies")
    assert await open_bodies(connection, subject_keys(), rows) == [
        Body(request="text", response="text")
    ]
    # Again: nothing is left to do, and nothing is said.
    assert await expired(connection, _POLICY) == []
    assert await run(connection) == []

    await release(connection)
    done = short(await run(connection))
    assert ("requests", "requests_y2024m03", 1, 0) in done
    assert await whose(connection) == []
    assert await months(connection) == []


async def test_late_records_of_a_month_that_went_are_swept(
    connection: asyncpg.Connection,
) -> None:
    await fill(connection, record(_OLD))
    await run(connection)
    await hold(connection, "ben")
    await writer.write(
        connection, [record(_OLD), record(_OLD, "ben"), record(utc_now())], subject_keys()
    )
    stray = [("bodies", "request_bodies_default", 1, 0), ("requests", "requests_default", 1, 0)]
    assert short(await expired(connection, _POLICY)) == stray
    assert short(await run(connection)) == stray
    assert await whose(connection) == [("ben", True), ("ann", True)]


async def test_a_partition_in_use_is_left_and_writers_go_on(
    connection: asyncpg.Connection, database: PostgresSettings
) -> None:
    await fill(connection, record(_OLD))
    reader = await connect(database, application_name="tests")
    async with reader.transaction():
        await reader.fetch("select * from comp_ai.requests_y2024m03")  # as a backup does
        done = await run(connection)
        assert [e.data for e in done] == [DataClass.BODIES, DataClass.BODIES, DataClass.REQUESTS]
        report = await writer.write(connection, [record(utc_now())], subject_keys())
        assert report.written == 1
    await reader.close()
    assert short(await run(connection)) == [("requests", "requests_y2024m03", 1, 0)]


async def test_two_runners_and_a_drain_at_once(
    connection: asyncpg.Connection, database: PostgresSettings
) -> None:
    await fill(connection, *(record(_OLD, f"p{n}") for n in range(50)))
    await hold(connection, "p7")
    stop = asyncio.Event()

    async def drain() -> int:
        """Write what is new and what is late, until told to stop."""
        own = await connect(database, application_name="tests")
        await writer.prepare_session(own)
        written = 0
        while not stop.is_set() or not written:
            report = await writer.write(
                own, [record(utc_now()), record(_OLD, "p7")], subject_keys()
            )
            assert not report.poison
            written += report.written
        await own.close()
        return written

    async def retain() -> list[Expired]:
        own = await connect(database, application_name="tests")
        done = await run(own)
        await own.close()
        return done

    draining = asyncio.create_task(drain())
    first, second = await asyncio.gather(retain(), retain())
    stop.set()
    written = await draining
    # Whatever was busy goes now.
    third = await run(connection)
    removed = sum(e.rows for e in [*first, *second, *third] if e.data is DataClass.REQUESTS)
    assert removed == 49
    assert await connection.fetchval("select count(*) from comp_ai.requests") == written + 1
    held = "select count(*) from comp_ai.requests where principal_id = 'p7'"
    assert await connection.fetchval(held) == written // 2 + 1


async def test_the_upkeep_tells_what_went_and_how_old_the_oldest_is(
    connection: asyncpg.Connection,
) -> None:
    told: list[tuple[DataClass, int, int]] = []
    ages: dict[DataClass, float] = {}

    class Metrics:
        def retention_removed(self, data: DataClass, partitions: int, rows: int) -> None:
            told.append((data, partitions, rows))

        def oldest_row_age_s(self, data: DataClass, seconds: float) -> None:
            ages[data] = seconds

    await fill(connection, record(_OLD), record(_OLD, "ben"), record(utc_now()))
    await hold(connection, "ben")
    await retention_task(RetentionPolicy(bodies=Keep(months=1)), Metrics()).run(connection)
    assert told == [(DataClass.BODIES, 1, 0), (DataClass.BODIES, 0, 1)]
    assert ages[DataClass.REQUESTS] > 365 * 86_400
    await release(connection)
    await retention_task(_POLICY, Metrics()).run(connection)
    assert ages[DataClass.REQUESTS] < 86_400


async def test_who_removes_is_named(connection: asyncpg.Connection) -> None:
    await fill(connection, record(_OLD))
    async for _ in apply(connection, _POLICY, Actor(id="ops@host", kind="operator")):
        pass
    rows = await connection.fetch("select distinct actor_id from comp_ai.audit_log")
    assert [row["actor_id"] for row in rows] == ["ops@host"]


def test_the_command_looks_first_and_removes_when_told(
    database: PostgresSettings, tmp_path: Path
) -> None:
    async def prepare() -> None:
        connection = await connect(database, application_name="tests")
        await fill(connection, record(_OLD))
        await connection.close()

    asyncio.run(prepare())
    config = tmp_path / "config.yaml"
    config.write_text(
        "applications:\n"
        "  - {name: a-model}\n"
        "  - {name: gateway, args: {request_log: {retention: {requests: {months: 13}}}}}\n"
    )
    asked = ("retention", "--config", str(config), "--json")
    looked = json.loads(comp_ai(database, *asked).stdout)
    assert looked["policy"] == {"requests": {"months": 13}}
    assert [one["rows"] for one in looked["expired"]] == [0, 1, 0, 1]
    done = json.loads(comp_ai(database, *asked, "--apply").stdout)
    assert done["removed"] == looked["expired"]
    said = comp_ai(database, "retention", "--config", str(config))
    assert said.stdout == "nothing is past its time\n"
    assert "bodies: kept for 13 months" in said.stderr

    config.write_text("applications: [{args: {request_log: {retention: {answers: {days: 1}}}}}]")
    wrong = comp_ai(database, *asked)
    assert (wrong.returncode, "request_log.retention.answers" in wrong.stderr) == (2, True)


async def test_what_is_past_its_time_stays_under_a_hold(
    connection: asyncpg.Connection, database: PostgresSettings
) -> None:
    for subject in ("ann", "ben"):
        await plant(connection, subject)
    for table in ("responses", "idempotency_keys", "files"):
        await connection.execute(f"update comp_ai.{table} set expires_at = now()")
    await connection.execute("update comp_ai.batches set status = 'completed'")
    await hold(connection, "ben")
    pool = build_pool(database, application_name="tests", max_size=1)
    try:
        # A response, an answer, a file with its chunk, and a batch.
        assert await Sweeper(pool).sweep() == 5
        left = await connection.fetch(
            "select principal_id from comp_ai.responses union all "
            "select principal_id from comp_ai.idempotency_keys union all "
            "select owner from comp_ai.files union all select owner from comp_ai.batches"
        )
        assert [row["principal_id"] for row in left] == ["ben"] * 4
        await release(connection)
        assert await Sweeper(pool).sweep() == 5
    finally:
        await pool.close()
