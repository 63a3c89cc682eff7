"""Every refusal of a permission or a model is in the audit log, once, whatever dies meanwhile."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import orjson

from serve_app.accounts import writer
from serve_app.accounts.request_log import LogConfig, RequestLog
from serve_app.accounts.spool import Spool
from serve_app.audit.verify import verify
from serve_app.database import connect
from serve_app.records import Outcome, PrincipalKind, RequestRecord, new_id, utc_now
from serve_app.settings import PostgresSettings
from tests.integration.conftest import PostgresServer
from tests.integration.fakes import client, principal, world
from tests.sealing import FORM, subject_keys

MODELS = [
    {"name": "small", "app": "model-small"},
    {"name": "secret", "app": "model-secret", "aliases": ["hidden"]},
]
_TIMEOUT_S = 60.0


class NoLogMetrics:
    """Drops what the log reports."""

    def spool_depth(self, rows: int) -> None: ...

    def spool_full(self, full: bool) -> None: ...

    def spool_lag_s(self, seconds: float) -> None: ...

    def postgres_write_s(self, seconds: float) -> None: ...

    def rows_written(self, rows: int) -> None: ...

    def bodies_not_redacted(self, rows: int) -> None: ...


def log_at(folder: Path, postgres: PostgresSettings, rows: int = 500) -> RequestLog:
    config = LogConfig(backoff_first_s=0.01, backoff_most_s=0.1, batch_rows=rows)
    return RequestLog(
        spool=Spool(folder, form=FORM),
        postgres=postgres,
        keys=subject_keys(),
        metrics=NoLogMetrics(),
        config=config,
    )


async def drained(folder: Path, postgres: PostgresSettings, records: list[RequestRecord]) -> None:
    log = log_at(folder, postgres)
    await log.start()
    try:
        await asyncio.gather(*(log.append(record) for record in records))
        assert await log.drain(_TIMEOUT_S)
    finally:
        await log.close()


async def audit_rows(postgres: PostgresSettings) -> list[dict[str, Any]]:
    connection = await connect(postgres, application_name="tests")
    try:
        assert (await verify(connection)).intact
        rows = await connection.fetch("select * from comp_ai.audit_log order by seq")
    finally:
        await connection.close()
    return [{**dict(row), "after": orjson.loads(row["after"])} for row in rows]


def refusal(**changes: Any) -> RequestRecord:
    fields = {
        "id": new_id(),
        "request_id": "r",
        "created_at": utc_now(),
        "route": "chat.completions",
        "status": 403,
        "outcome": Outcome.REFUSED,
        "error_code": "permission_denied",
        "principal_id": "eve",
        "principal_kind": PrincipalKind.USER,
        "client_address": "192.0.2.9",
        "denied": "comp-ai:user",
    }
    return RequestRecord(**{**fields, **changes})


async def test_refusals_say_who_what_when_and_from_where(
    tmp_path: Path, database: PostgresSettings
) -> None:
    key_id = new_id()
    async with world(models=MODELS) as served, client(served) as http:
        known = served.authenticator.principals
        known["none"] = principal("eve", permissions=frozenset())
        known["small"] = principal(
            "ann",
            models=frozenset({"small"}),
            kind=PrincipalKind.API_KEY,
            api_key_id=key_id,
        )
        headers = {"x-real-ip": "192.0.2.7", "x-request-id": "request-7"}
        refused = await http.get("/v1/models", headers={**headers, "authorization": "Bearer none"})
        assert refused.status_code == 403
        only_small = {**headers, "authorization": "Bearer small"}
        answers = [
            await http.get("/v1/models/hidden", headers=only_small),
            await http.post(
                "/v1/completions", headers=only_small, json={"model": "secret", "prompt": "p"}
            ),
            await http.get("/v1/models/absent", headers=only_small),
            await http.get("/v1/nowhere", headers=only_small),
        ]
        assert [answer.status_code for answer in answers] == [404] * 4
        forbidden, absent = answers[0].json()["error"], answers[2].json()["error"]
        assert forbidden["message"].replace("hidden", "absent") == absent["message"]
        assert (await http.get("/v1/models", headers=only_small)).status_code == 200
        await served.quiet(6)
        records = list(served.records)
    await drained(tmp_path, database, records)
    rows = await audit_rows(database)
    assert [(row["actor_id"], row["target"], row["after"]["route"]) for row in rows] == [
        ("eve", "comp-ai:user", "models"),
        ("ann", "model:secret", "models"),
        ("ann", "model:secret", "completions"),
    ]
    assert {row["action"] for row in rows} == {"permission.refuse"}
    assert {(row["client_address"], row["request_id"]) for row in rows} == {
        ("192.0.2.7", "request-7")
    }
    assert [row["api_key_id"] for row in rows] == [None, key_id, key_id]
    assert [row["at"] for row in rows] == [
        record.created_at for record in records if record.denied is not None
    ]


async def test_a_repeated_batch_adds_no_second_row(database: PostgresSettings) -> None:
    connection = await connect(database, application_name="tests")
    await writer.prepare_session(connection)
    records = [refusal() for _ in range(5)]
    assert (await writer.write(connection, records, subject_keys())).written == 5
    assert (await writer.write(connection, [*records, refusal()], subject_keys())).written == 1
    await connection.close()
    rows = await audit_rows(database)
    assert len(rows) == 6
    # A batch is written in the order of its ids.
    assert [row["after"]["record"] for row in rows[:5]] == sorted(str(r.id) for r in records)


async def test_a_bad_row_in_the_batch_costs_no_refusal(database: PostgresSettings) -> None:
    connection = await connect(database, application_name="tests")
    await writer.prepare_session(connection)
    good = [refusal() for _ in range(6)]
    bad = refusal(prompt_tokens=-1)
    report = await writer.write(connection, [*good[:2], bad, *good[2:]], subject_keys())
    await connection.close()
    assert [row_id for row_id, _ in report.poison] == [bad.id]
    assert len(await audit_rows(database)) == 6


async def test_refusals_wait_in_the_spool_while_postgresql_is_away(
    tmp_path: Path, database: PostgresSettings
) -> None:
    away = log_at(tmp_path, database.model_copy(update={"host": "/nonexistent"}))
    await away.start()
    await away.append(refusal())
    await away.close()
    assert await audit_rows(database) == []
    await drained(tmp_path, database, [])
    assert len(await audit_rows(database)) == 1


async def test_drains_that_are_cut_off_leave_each_refusal_once(
    tmp_path: Path, database: PostgresSettings, postgres_server: PostgresServer
) -> None:
    log = log_at(tmp_path, database, rows=7)
    records = [refusal() for _ in range(300)]
    await log.start()
    for record in records:
        await log.append(record)
    admin = await connect(postgres_server.embedded.admin_settings(), application_name="tests")
    draining = asyncio.create_task(log.drain(_TIMEOUT_S))
    while not draining.done():
        await admin.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity "
            f"where datname = '{database.database}' and application_name = 'comp-ai request-log'"
        )
        # Else no batch would ever come through.
        await _some_progress(log, draining)
    await admin.close()
    assert draining.result()
    await log.close()
    found = Counter(row["after"]["record"] for row in await audit_rows(database))
    assert found == Counter(str(record.id) for record in records)


async def _some_progress(log: RequestLog, draining: asyncio.Task[bool]) -> None:
    before = (await log.status()).written_total
    while not draining.done() and (await log.status()).written_total == before:
        pass  # each status is a turn of the spool's thread, so this does not spin
