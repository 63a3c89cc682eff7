"""What one request takes on disk: in the spool, and in PostgreSQL with its indexes.

    .venv/bin/python -m load_tests.storage

Records go through the real log into a real PostgreSQL, once without texts and once for each
length of text; then the relations are measured. Writes what it saw to `load_tests/results/`.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import asyncpg

from load_tests.request_log import RESULTS, _folder, _log, _records, _server
from serve_app.accounts.sealing.master_keys import MasterKeys, new_master_key
from serve_app.accounts.spool import Spool
from serve_app.accounts.spooled import SpooledForm
from serve_app.database import connect
from serve_app.records import RequestRecord
from serve_app.settings import PostgresSettings

_DRAIN_TIMEOUT_S = 600.0
_EMPTY = "truncate comp_ai.requests, comp_ai.request_bodies, comp_ai.usage_pending"
_SIZE = """
select coalesce(sum(pg_relation_size(relid)), 0)::bigint as heap,
       coalesce(sum(pg_total_relation_size(relid)), 0)::bigint as total
from pg_partition_tree($1) where isleaf
"""


@dataclass(frozen=True, kw_only=True)
class Storage:
    """Bytes a request. Totals are with indexes and TOAST."""

    text_chars: int
    spool_bytes: float
    requests_heap_bytes: float
    requests_bytes: float
    bodies_bytes: float

    @property
    def postgres_bytes(self) -> float:
        """Of both tables."""
        return self.requests_bytes + self.bodies_bytes


def _without_texts(records: Sequence[RequestRecord]) -> list[RequestRecord]:
    return [
        dataclasses.replace(record, request_body=None, response_text=None) for record in records
    ]


async def _spooled(folder: Path, masters: MasterKeys, records: Sequence[RequestRecord]) -> int:
    """Put `records` into a spool below `folder` and return its size, in bytes."""
    spool = Spool(folder, form=SpooledForm(masters))
    await spool.open()
    await asyncio.gather(*(spool.append(record) for record in records))
    await spool.close()
    return _size_of(folder)


def _size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


async def _sizes(connection: asyncpg.Connection, table: str) -> tuple[int, int]:
    row = await connection.fetchrow(_SIZE, table)
    assert row is not None
    return row["heap"], row["total"]


async def _measure(
    postgres: PostgresSettings, connection: asyncpg.Connection, number: int, text_chars: int
) -> Storage:
    await connection.execute(_EMPTY)
    masters = MasterKeys.parse(new_master_key())
    records = _records(number, text_chars)
    records = records if text_chars else _without_texts(records)
    with _folder() as folder:
        spool_bytes = await _spooled(folder, masters, records)
        async with _log(folder, postgres, masters) as log:
            if not await log.drain(_DRAIN_TIMEOUT_S):
                raise SystemExit(f"not drained within {_DRAIN_TIMEOUT_S:g} s")
    heap, total = await _sizes(connection, "comp_ai.requests")
    _, bodies = await _sizes(connection, "comp_ai.request_bodies")
    return Storage(
        text_chars=text_chars,
        spool_bytes=spool_bytes / number,
        requests_heap_bytes=heap / number,
        requests_bytes=total / number,
        bodies_bytes=bodies / number,
    )


async def _measure_all(
    postgres: PostgresSettings, admin: PostgresSettings, number: int, lengths: Sequence[int]
) -> list[Storage]:
    connection = await connect(admin, application_name="benchmark", statement_timeout_s=0)
    try:
        seen = []
        for text_chars in lengths:
            # Each run has a master key of its own.
            await connection.execute("truncate comp_ai_keys.subject_keys")
            seen.append(await _measure(postgres, connection, number, text_chars))
        return seen
    finally:
        await connection.close()


def _report(number: int, seen: Sequence[Storage]) -> str:
    lines = [
        f"Bytes for one request, of {number} of 200 people; PostgreSQL with indexes and TOAST, "
        "right after the writes. Texts are random letters, which do not compress; prompt and "
        "answer have so many characters each.",
        "",
        "| texts | spool | `requests`, rows alone | `requests` | `request_bodies` | PostgreSQL |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for one in seen:
        lines.append(
            f"| {one.text_chars or 'none kept'} | {one.spool_bytes:.0f} "
            f"| {one.requests_heap_bytes:.0f} | {one.requests_bytes:.0f} "
            f"| {one.bodies_bytes:.0f} | {one.postgres_bytes:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--text-chars", type=int, nargs="*", default=[0, 500, 2_000, 8_000])
    given = parser.parse_args()
    with _server() as server:
        postgres = server.embedded.settings()
        admin = server.embedded.admin_settings().model_copy(update={"database": postgres.database})
        seen = asyncio.run(_measure_all(postgres, admin, given.rows, given.text_chars))
    report = _report(given.rows, seen)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "storage.md").write_text(report + "\n")
    (RESULTS / "storage.json").write_text(
        json.dumps([asdict(one) for one in seen], indent=1) + "\n"
    )
    print(report)


if __name__ == "__main__":
    main()
