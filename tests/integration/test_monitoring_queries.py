"""Grafana's role in PostgreSQL reads the sums of usage, for the dashboard, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest
from pydantic import SecretStr

from serve_app.database import connect
from serve_app.settings import PostgresSettings
from tests.integration.conftest import PostgresServer

PROJECT = Path(__file__).parents[2]
GRAFANA = PROJECT / "monitoring" / "grafana"
PASSWORD = "of-the-reader-alone"


def _make_reader(server: PostgresServer, database: str, password: Path) -> None:
    admin = server.embedded.admin_settings()
    assert admin.password is not None
    script = subprocess.run(
        [GRAFANA / "usage-reader.sh", password], check=True, capture_output=True
    )
    subprocess.run(
        [server.embedded.bin_dir / "psql", "--no-psqlrc", "--quiet"],
        check=True,
        input=script.stdout,
        env=os.environ
        | {
            "PGHOST": admin.host,
            "PGPORT": str(admin.port),
            "PGUSER": admin.user,
            "PGPASSWORD": admin.password.get_secret_value(),
            "PGDATABASE": database,
        },
    )


@pytest.fixture
def reader(
    postgres_server: PostgresServer, database: PostgresSettings, tmp_path: Path
) -> PostgresSettings:
    """How the role connects, made twice: the second time changes nothing."""
    password = tmp_path / "password"
    password.write_text(PASSWORD)
    for _ in range(2):
        _make_reader(postgres_server, database.database, password)
    return database.model_copy(
        update={"user": "comp_ai_usage_reader", "password": SecretStr(PASSWORD)}
    )


def _questions() -> Iterator[tuple[str, str]]:
    for panel in json.loads((GRAFANA / "dashboards" / "usage.json").read_text())["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["rawSql"]


def _filled_in(sql: str) -> str:
    """Return what Grafana makes of its macro."""
    return sql.replace(
        "$__timeFilter(bucket)", "bucket between now() - interval '7 days' and now()"
    )


async def test_the_dashboard_of_usage_returns_what_was_used(
    reader: PostgresSettings, connection: asyncpg.Connection
) -> None:
    key = "00000000-0000-0000-0000-000000000000"
    await connection.execute(
        "insert into comp_ai.usage_hour values (date_trunc('hour', now()), 'ada', 'm', $1, true,"
        " 3, 10, 20, 1500000, 900, 3, 300)",
        key,
    )
    await connection.execute(
        "insert into comp_ai.usage_hour_by_model values (date_trunc('hour', now()), 'm', true,"
        " 3, 10, 20, 1500000, 900, 3, 300)"
    )
    opened = await connect(reader, application_name="grafana")
    try:
        found = {name: await opened.fetch(_filled_in(sql)) for name, sql in _questions()}
    finally:
        await opened.close()
    assert all(found.values())
    [row] = found["By principal"]
    assert (row["principal"], row["requests"], row["cost"]) == ("ada", 3, 1.5)
    [series] = found["Tokens by principal"]
    assert (series["metric"], series["value"]) == ("ada", 30)
    # Grafana takes the column `time` for the time.
    assert {"time", "metric", "value"} == set(series.keys())


@pytest.mark.parametrize(
    "statement",
    [
        "select 1 from comp_ai.requests",
        "select 1 from comp_ai.request_bodies",
        "select 1 from comp_ai.api_keys",
        "select 1 from comp_ai.audit_log",
        "select 1 from comp_ai_keys.subject_keys",
    ],
)
async def test_the_reader_reads_nothing_else(reader: PostgresSettings, statement: str) -> None:
    opened = await connect(reader, application_name="grafana")
    try:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await opened.fetch(statement)
    finally:
        await opened.close()


async def test_the_reader_changes_nothing(reader: PostgresSettings) -> None:
    opened = await connect(reader, application_name="grafana")
    try:
        await opened.execute("set default_transaction_read_only = off")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await opened.execute("delete from comp_ai.usage_hour")
    finally:
        await opened.close()


def test_a_password_that_would_break_the_statement_is_refused(tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text("x'; drop schema comp_ai; --")
    done = subprocess.run([GRAFANA / "usage-reader.sh", password], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
