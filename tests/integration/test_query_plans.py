"""The plans of the auditors' and usage queries on a filled database: by index, and pruned."""

from __future__ import annotations

import re
import uuid
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from load_tests.generate_requests import generate
from load_tests.queries import Question, questions
from serve_app.database import connect
from serve_app.settings import PostgresSettings

ROWS = 60_000
# To read so few rows whole is right: the first of the months may have but a day.
_SMALL = """
select relname from pg_class
where relnamespace = 'comp_ai'::regnamespace and relkind = 'r' and reltuples < 1000
"""


async def _plan(connection: asyncpg.Connection, question: Question) -> str:
    rows = await connection.fetch(f"explain {question.sql}", *question.values)
    return "\n".join(row[0] for row in rows)


async def test_no_question_reads_a_large_table_whole(database: PostgresSettings) -> None:
    connection = await connect(database, application_name="tests", statement_timeout_s=0)
    await generate(connection, ROWS, months=4)
    await connection.execute("set plan_cache_mode = force_custom_plan")
    small = {row["relname"] for row in await connection.fetch(_SMALL)}
    now = datetime.now(UTC)
    asked = questions(now, uuid.uuid4(), now - timedelta(days=1))
    old = f"_y{now - timedelta(days=100):%Ym%m}"
    for question in asked:
        plan = await _plan(connection, question)
        if question.name.startswith("search"):
            scans = re.findall(r"Seq Scan on (\w+)", plan)
            assert set(scans) <= small, plan
        if any(span in question.name for span in ("30 days", "7 days", "2 hours", "last week")):
            assert old not in plan, plan
    by_name = {question.name: await _plan(connection, question) for question in asked}
    for name, index in (
        ("search: one key, last 30 days", "api_key_id_created_at_idx"),
        ("search: one X-Request-ID", "request_id_created_at_idx"),
        ("search: what failed", "outcome_created_at_idx"),
        ("search: one principal", "principal_id_created_at_idx"),
        ("usage: mine, by day, 30 days", "principal_id_bucket_idx"),
        ("usage: all, by day, 30 days", "usage_day_by_model"),
    ):
        assert index in by_name[name], by_name[name]
    await connection.close()


@pytest.mark.parametrize("name", ["usage_day", "requests"])
async def test_months_that_are_not_asked_for_are_not_read(
    connection: asyncpg.Connection, name: str
) -> None:
    await connection.execute("select comp_ai.ensure_partitions('2026-01-01', 6)")
    column = "bucket" if name == "usage_day" else "created_at"
    rows = await connection.fetch(
        f"explain select * from comp_ai.{name} where {column} >= '2026-03-05' "
        f"and {column} < '2026-03-08'"
    )
    plan = "\n".join(row[0] for row in rows)
    assert f"{name}_y2026m03" in plan
    assert f"{name}_y2026m02" not in plan
