"""The auditors' and usage queries on 5 million requests: how long each takes, and by which plan.

    python -m load_tests.queries --rows 5000000 --repeats 50

Starts a PostgreSQL of its own in a temporary folder, fills it (load_tests/generate_requests.py),
asks each question again and again through the code that the service asks with, and writes medians,
99th percentiles and plans to load_tests/results/queries.{json,md}.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg

from load_tests.generate_requests import generate
from serve_app.database import connect, migrate
from serve_app.records import Outcome
from serve_app.search.reading import RequestFilter, search_sql
from serve_app.settings import PostgresSettings
from serve_app.stack.accounts import MIGRATIONS
from serve_app.stack.postgres import EmbeddedPostgres
from serve_app.usage.question import By, Unit, UsagePage, UsageQuestion
from serve_app.usage.reading import prepare

RESULTS = Path(__file__).parent / "results"
TARGET_MS = 50.0
_READY_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Question:
    """A statement and its values, as the service asks it."""

    name: str
    sql: str
    values: tuple[Any, ...]


def questions(now: datetime, last_id: uuid.UUID, last_at: datetime) -> list[Question]:
    """Return what auditors and callers ask."""
    today = now.replace(hour=0, minute=0, second=0, microsecond=0)
    month = today - timedelta(days=30)
    key = uuid.UUID("00000000-0000-4000-8000-0000000000a1")
    return [
        _usage("usage: mine, by day, 30 days", month, Unit.DAY, principal="person-7"),
        _usage(
            "usage: mine, by day and model, 180 days",
            today - timedelta(days=180), Unit.DAY, (By.MODEL,), principal="person-7",
        ),
        _usage("usage: mine, by hour, 2 days", today - timedelta(days=2), Unit.HOUR,
               principal="person-7"),
        _usage("usage: mine, by minute, 2 hours", _hours_ago(now, 2), Unit.MINUTE,
               principal="person-7"),
        _usage("usage: all, by day, 30 days", month, Unit.DAY),
        _usage("usage: all, by day and model, 180 days", today - timedelta(days=180), Unit.DAY,
               (By.MODEL,)),
        _usage("usage: all, by hour, 7 days", today - timedelta(days=7), Unit.HOUR),
        _usage("usage: all, by principal, 30 days", month, None, (By.PRINCIPAL,)),
        _usage("usage: all, by day and principal, 30 days", month, Unit.DAY, (By.PRINCIPAL,)),
        _usage("usage: all, by key, 7 days", today - timedelta(days=7), None, (By.KEY,)),
        _usage("usage: one key, by day, 30 days", month, Unit.DAY, key=key),
        _usage("usage: all, by minute, 2 hours", _hours_ago(now, 2), Unit.MINUTE),
        _search("search: the newest"),
        _search("search: the next page", place=(last_at, last_id)),
        _search("search: one principal", principal="person-700"),
        _search("search: one principal, what failed", principal="person-7",
                outcome=Outcome.FAILED),
        _search("search: one key, last 30 days", key=key, since=month),
        _search("search: one model, a day of 3 months ago", model="model-9",
                since=today - timedelta(days=90), until=today - timedelta(days=89)),
        _search("search: what failed", outcome=Outcome.FAILED),
        _search("search: status 429, last week", status=429, since=today - timedelta(days=7)),
        _search("search: one X-Request-ID", request_id="req-1234567"),
    ]  # fmt: skip


def _hours_ago(now: datetime, hours: int) -> datetime:
    return now.replace(minute=0, second=0, microsecond=0) - timedelta(hours=hours)


def _usage(
    name: str, since: datetime, unit: Unit | None, by: tuple[By, ...] = (), **named: Any
) -> Question:
    question = UsageQuestion(since=since, unit=unit, by=by, **named)
    asked = prepare(question, UsagePage(limit=101))
    return Question(name, asked.sql, asked.values)


def _search(name: str, place: tuple[datetime, uuid.UUID] | None = None, **named: Any) -> Question:
    sql, values = search_sql(RequestFilter(**named), limit=101, place=place)
    return Question(name, sql, tuple(values))


async def ask(connection: asyncpg.Connection, question: Question, repeats: int) -> dict[str, Any]:
    """Return how long `question` takes, and its plan."""
    await connection.fetch(question.sql, *question.values)
    took_ms, cpu_begun_ms = [], _cpu_ms(connection)
    for _ in range(repeats):
        started_s = time.perf_counter()
        rows = await connection.fetch(question.sql, *question.values)
        took_ms.append((time.perf_counter() - started_s) * 1000)
    cpu_ms = (_cpu_ms(connection) - cpu_begun_ms) / repeats
    plan = await connection.fetch(
        f"explain (analyze, buffers, costs off) {question.sql}", *question.values
    )
    took_ms.sort()
    return {
        "question": question.name,
        "rows": len(rows),
        "median_ms": round(statistics.median(took_ms), 2),
        "p99_ms": round(took_ms[min(len(took_ms) - 1, round(0.99 * len(took_ms)))], 2),
        "cpu_ms": round(cpu_ms, 2),
        "plan": [row[0] for row in plan],
    }


def _cpu_ms(connection: asyncpg.Connection) -> float:
    """Return the CPU time of the connection's server process so far: others' load is not in it."""
    took_ns = Path(f"/proc/{connection.get_server_pid()}/schedstat").read_text().split()[0]
    return int(took_ns) / 1e6


async def _questions(connection: asyncpg.Connection) -> list[Question]:
    last = await connection.fetchrow(
        "select id, created_at from comp_ai.requests order by created_at desc offset 5000 limit 1"
    )
    assert last is not None
    return questions(datetime.now(UTC), last["id"], last["created_at"])


@asynccontextmanager
async def _server() -> AsyncIterator[PostgresSettings]:
    home = Path(tempfile.mkdtemp(prefix="cai-"))
    embedded = EmbeddedPostgres(home)
    embedded.prepare()
    process = subprocess.Popen(  # noqa: ASYNC220 - nothing else runs here
        # Filling it needs no safety, and asking is not changed by it.
        [*embedded.command(), "-c", "fsync=off", "-c", "shared_buffers=1GB",
         "-c", "max_wal_size=8GB", "-c", "wal_level=minimal", "-c", "max_wal_senders=0",
         # What is asked has just been vacuumed.
         "-c", "autovacuum=off"],
        user=embedded.user, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        await embedded.wait_ready(_READY_TIMEOUT_S)
        await migrate(embedded.settings(), directory=MIGRATIONS)
        yield embedded.settings()
    finally:
        await embedded.stop()
        process.wait()
        shutil.rmtree(home)


def _machine() -> str:
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores, {memory_gib:.0f} GiB, no GPU, {platform.system()}"


def _markdown(result: dict[str, Any]) -> str:
    lines = [
        "# Usage and searches on many requests",
        f"{result['rows']:,} requests of {result['people']:,} people and {result['models']} models "
        f"over {result['months']} months; {result['machine']}; load average {result['load']}; "
        f"PostgreSQL {result['postgres']} with 1 GB of shared buffers. Filling it took "
        f"{result['fill_s']:.0f} s, usage and indexes included. Each question is asked "
        f"{result['repeats']} times, one at a time, for a page of 100 rows. "
        f"The target is {TARGET_MS:.0f} ms at the median. "
        "`python -m load_tests.queries` makes this page.",
        "",
        "| question | rows | median, ms | 99th percentile, ms | CPU time of the server, mean, ms |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in result["questions"]:
        lines.append(
            f"| {row['question']} | {row['rows']} | {row['median_ms']} | {row['p99_ms']} "
            f"| {row['cpu_ms']} |"
        )
    lines += ["", "## Plans"]
    for row in result["questions"]:
        lines += [f"### {row['question']}", "```", *row["plan"], "```", ""]
    return "\n".join(lines).rstrip() + "\n"


async def _main(arguments: argparse.Namespace) -> None:
    async with _server() as settings:
        connection = await connect(settings, application_name="queries", statement_timeout_s=0)
        started_s = time.monotonic()
        await generate(connection, arguments.rows)
        fill_s = time.monotonic() - started_s
        print(f"filled in {fill_s:.0f} s", flush=True)
        await connection.execute("set plan_cache_mode = force_custom_plan")
        asked = []
        for question in await _questions(connection):
            asked.append(await ask(connection, question, arguments.repeats))
            print({k: v for k, v in asked[-1].items() if k != "plan"}, flush=True)
        result = {
            "rows": arguments.rows, "people": 1000, "models": 10, "months": 6,
            "repeats": arguments.repeats, "fill_s": round(fill_s, 1), "machine": _machine(),
            "load": round(os.getloadavg()[0], 1),
            "postgres": await connection.fetchval("show server_version"),
            "questions": asked,
        }  # fmt: skip
        await connection.close()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "queries.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "queries.md").write_text(_markdown(result))


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--repeats", type=int, default=50)
    asyncio.run(_main(parser.parse_args()))


if __name__ == "__main__":
    main()
