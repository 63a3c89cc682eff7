"""What the request log takes and gives: appends acknowledged, and rows a second into PostgreSQL.

    .venv/bin/python -m load_tests.request_log

Appends are timed one by one with 1, 16 and 64 under way, while the log drains into a real
PostgreSQL. Then a spool full of records is drained as fast as it goes, beside plain COPY of the
same rows into tables of the same shape, with the same indexes. The two take turns, so that a
busy moment of the machine hits both. Writes what it saw to `load_tests/results/`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import shutil
import statistics
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import asyncpg
import psutil

from serve_app.accounts.metrics import NoMetrics
from serve_app.accounts.request_log import RequestLog
from serve_app.accounts.sealing.master_keys import MasterKeys, new_master_key
from serve_app.accounts.sealing.subject_keys import SubjectKeys
from serve_app.accounts.spool import Spool
from serve_app.accounts.spooled import SpooledForm
from serve_app.database import connect, migrate
from serve_app.records import Outcome, PrincipalKind, RequestRecord, new_id, utc_now
from serve_app.settings import PostgresSettings
from tests.integration.conftest import MIGRATIONS, PostgresServer

RESULTS = Path(__file__).parent / "results"
AT_A_TIME = (1, 16, 64)
_DRAIN_TIMEOUT_S = 600.0
_BODIES = ("request_body", "response_text")
_NO_COLUMNS = (*_BODIES, "traceparent")
_COLUMNS = tuple(f.name for f in fields(RequestRecord) if f.name not in _NO_COLUMNS)
_BODY_COLUMNS = ("id", "created_at", *_BODIES)
_PLAIN = """
create schema plain;
create table plain.requests (like comp_ai.requests including all);
create table plain.request_bodies (like comp_ai.request_bodies including all);
"""
_EMPTY = """
truncate plain.requests, plain.request_bodies, comp_ai.requests, comp_ai.request_bodies,
    comp_ai.usage_pending;
checkpoint;
"""


@dataclass(frozen=True, kw_only=True)
class Appends:
    """Appends with so many under way: how long each waited, and how many a second."""

    at_a_time: int
    p50_ms: float
    p99_ms: float
    per_s: float


@dataclass(frozen=True, kw_only=True)
class Round:
    """Rows a second of the log and of COPY, and this process's CPU time for a row of the log."""

    log_rows_per_s: float
    copy_rows_per_s: float
    log_cpu_us: float

    @property
    def ratio(self) -> float:
        """Of the log to COPY."""
        return self.log_rows_per_s / self.copy_rows_per_s


@contextmanager
def _server() -> Iterator[PostgresServer]:
    # A socket's path is limited to 107 bytes.
    home = Path(tempfile.mkdtemp(prefix="cai-"))
    server = PostgresServer(home)
    try:
        server.start()
        asyncio.run(migrate(server.embedded.settings(), directory=MIGRATIONS))
        yield server
    finally:
        server.stop()
        shutil.rmtree(home)


@contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="cai-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@asynccontextmanager
async def _log(
    folder: Path, postgres: PostgresSettings, masters: MasterKeys
) -> AsyncIterator[RequestLog]:
    log = RequestLog(
        spool=Spool(folder, form=SpooledForm(masters)),
        postgres=postgres,
        keys=SubjectKeys(masters),
        metrics=NoMetrics(),
    )
    await log.start()
    try:
        yield log
    finally:
        await log.close()


def _record(chance: random.Random, text_chars: int) -> RequestRecord:
    """Return a completed chat of one of 200 people."""
    text = "".join(chance.choices("etaoin shrdlu", k=text_chars))
    return RequestRecord(
        id=new_id(),
        request_id=str(uuid.UUID(int=chance.getrandbits(128))),
        created_at=utc_now(),
        route="chat.completions",
        status=200,
        outcome=Outcome.COMPLETED,
        principal_id=f"person-{chance.randrange(200)}",
        principal_kind=PrincipalKind.USER,
        client_address="10.1.2.3",
        model=f"model-{chance.randrange(3)}",
        stream=True,
        finish_reason="stop",
        prompt_tokens=chance.randrange(2000),
        completion_tokens=chance.randrange(500),
        auth_ms=0.1,
        limits_ms=0.9,
        queue_ms=1.5,
        time_to_first_token_ms=chance.uniform(20, 200),
        inter_token_mean_ms=chance.uniform(5, 30),
        duration_ms=chance.uniform(100, 9000),
        replica_id=f"replica-{chance.randrange(4)}",
        request_body=text,
        response_text=text[::-1],
    )


def _records(number: int, text_chars: int) -> list[RequestRecord]:
    chance = random.Random(7)
    return [_record(chance, text_chars) for _ in range(number)]


async def _time_appends(log: RequestLog, records: Sequence[RequestRecord], workers: int) -> Appends:
    waiting, taken_ms = iter(records), []

    async def append() -> None:
        for record in waiting:
            begun = time.perf_counter()
            await log.append(record)
            taken_ms.append((time.perf_counter() - begun) * 1000)

    begun = time.perf_counter()
    await asyncio.gather(*(append() for _ in range(workers)))
    per_s = len(records) / (time.perf_counter() - begun)
    cuts = statistics.quantiles(taken_ms, n=100, method="inclusive")
    return Appends(at_a_time=workers, p50_ms=cuts[49], p99_ms=cuts[98], per_s=per_s)


async def _appends(
    postgres: PostgresSettings, masters: MasterKeys, number: int, text_chars: int, rounds: int
) -> list[Appends]:
    """Return the medians of several rounds, in which the numbers under way take turns."""
    seen: dict[int, list[Appends]] = {workers: [] for workers in AT_A_TIME}
    with _folder() as folder:
        async with _log(folder, postgres, masters) as log:
            await _time_appends(log, _records(200, text_chars), 16)
            for _ in range(rounds):
                for workers in AT_A_TIME:
                    records = _records(number, text_chars)
                    seen[workers].append(await _time_appends(log, records, workers))
            await log.drain(_DRAIN_TIMEOUT_S)
    return [_median(of) for of in seen.values()]


def _median(of: Sequence[Appends]) -> Appends:
    return Appends(
        at_a_time=of[0].at_a_time,
        p50_ms=statistics.median(one.p50_ms for one in of),
        p99_ms=statistics.median(one.p99_ms for one in of),
        per_s=statistics.median(one.per_s for one in of),
    )


async def _drain(
    postgres: PostgresSettings, masters: MasterKeys, records: Sequence[RequestRecord]
) -> tuple[float, float]:
    """Return how long the log takes to move `records`, and the CPU time of this process, in s."""
    with _folder() as folder:
        spool = Spool(folder, form=SpooledForm(masters))
        await spool.open()
        await asyncio.gather(*(spool.append(record) for record in records))
        await spool.close()
        begun, begun_cpu = time.perf_counter(), time.process_time()
        async with _log(folder, postgres, masters) as log:
            if not await log.drain(_DRAIN_TIMEOUT_S):
                raise SystemExit(f"not drained within {_DRAIN_TIMEOUT_S:g} s")
            return time.perf_counter() - begun, time.process_time() - begun_cpu


async def _copy(connection: asyncpg.Connection, records: Sequence[RequestRecord]) -> float:
    """Return how long plain COPY of the rows takes, in s: one for each table."""
    rows = [tuple(getattr(record, name) for name in _COLUMNS) for record in records]
    bodies = [tuple(getattr(record, name) for name in _BODY_COLUMNS) for record in records]
    begun = time.perf_counter()
    async with connection.transaction():
        for table, columns, values in (
            ("requests", _COLUMNS, rows),
            ("request_bodies", _BODY_COLUMNS, bodies),
        ):
            await connection.copy_records_to_table(
                table, schema_name="plain", columns=columns, records=values
            )
    return time.perf_counter() - begun


async def _rounds(
    server: PostgresServer, masters: MasterKeys, number: int, text_chars: int, rounds: int
) -> list[Round]:
    admin = server.embedded.admin_settings().model_copy(
        update={"database": server.embedded.settings().database}
    )
    connection = await connect(admin, application_name="benchmark", statement_timeout_s=0)
    await connection.execute(_PLAIN)
    records, seen = _records(number, text_chars), []
    for _ in range(rounds):
        await connection.execute(_EMPTY)
        copy_s = await _copy(connection, records)
        log_s, cpu_s = await _drain(server.embedded.settings(), masters, records)
        rate = Round(
            log_rows_per_s=number / log_s,
            copy_rows_per_s=number / copy_s,
            log_cpu_us=cpu_s / number * 1e6,
        )
        seen.append(rate)
    await connection.close()
    return seen


def _report(appends: Sequence[Appends], drained: Sequence[Round], what: str) -> str:
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, "
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB, Python {platform.python_version()}"
    )
    lines = [
        f"{machine}; {what}; medians of {len(drained)} rounds; load average "
        f"{os.getloadavg()[0]:.1f}. PostgreSQL on the same machine and disk.",
        "",
        "| appends under way | p50, ms | p99, ms | a second |",
        "| --- | --- | --- | --- |",
    ]
    for one in appends:
        lines.append(f"| {one.at_a_time} | {one.p50_ms:.2f} | {one.p99_ms:.2f} | {one.per_s:.0f} |")
    log, copy, cpu_us, ratio = (
        statistics.median(getattr(one, name) for one in drained)
        for name in ("log_rows_per_s", "copy_rows_per_s", "log_cpu_us", "ratio")
    )
    lines += [
        "",
        "| | rows a second |",
        "| --- | --- |",
        f"| spool to PostgreSQL | {log:.0f} |",
        f"| plain COPY | {copy:.0f} |",
        f"| ratio | {ratio:.2f} |",
        "",
        f"CPU time of the log for a row: {cpu_us:.0f} µs. The log opens what was sealed for the "
        "spool, seals it with the key of its subject, adds up usage, and leaves out what is there "
        "already, in transactions of 1,000 rows. COPY does none of that, in one transaction.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=20_000, help="drained in a round")
    parser.add_argument("--appends", type=int, default=2_000, help="of a kind in a round")
    parser.add_argument("--text-chars", type=int, default=1_000, help="of prompt and of answer")
    given = parser.parse_args()
    masters = MasterKeys.parse(new_master_key())
    with _server() as server:
        postgres = server.embedded.settings()
        appends = asyncio.run(
            _appends(postgres, masters, given.appends, given.text_chars, given.rounds)
        )
        drained = asyncio.run(_rounds(server, masters, given.rows, given.text_chars, given.rounds))
    what = f"{given.rows} rows, {given.text_chars} characters of prompt and as many of answer"
    report = _report(appends, drained, what)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "request_log.md").write_text(report + "\n")
    raw = {
        "appends": [asdict(one) for one in appends],
        "rounds": [asdict(one) | {"ratio": one.ratio} for one in drained],
    }
    (RESULTS / "request_log.json").write_text(json.dumps(raw, indent=1) + "\n")
    print(report)


if __name__ == "__main__":
    main()
