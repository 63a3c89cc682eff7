"""Keeping the usage tables: pending rows are folded into them, by the upkeep."""

from __future__ import annotations

from functools import cache

import asyncpg

from serve_app.accounts.upkeep import Task
from serve_app.sql import named_queries

FOLD_EVERY_S = 10.0
# The table of days to add is empty but after an update, so this mostly finds nothing.
BACKFILL_EVERY_S = 600.0
FOLD_ROWS = 10_000

_CALLER = ("principal_id", "model", "api_key_id", "completed")
_MODEL = ("model", "completed")
# The unit of time of each table, and what it is by beside that.
_TABLES = {
    "usage_minute": ("minute", _CALLER),
    "usage_hour": ("hour", _CALLER),
    "usage_day": ("day", _CALLER),
    "usage_hour_by_model": ("hour", _MODEL),
    "usage_day_by_model": ("day", _MODEL),
}


async def fold(connection: asyncpg.Connection, *, most_rows: int = FOLD_ROWS) -> int:
    """Fold all pending rows, `most_rows` in one statement; return how many they were.

    Each is taken and added in one statement, so it is added once whatever breaks off. Let one
    process do it at a time: two would wait for each other's rows.

    Raises:
        asyncpg.PostgresError: PostgreSQL refuses; what was folded stays so.
    """
    folded = 0
    while True:
        rows: int = await connection.fetchval(_fold_sql(), most_rows)
        folded += rows
        if rows < most_rows:
            return folded


async def backfill(connection: asyncpg.Connection) -> int:
    """Append to the pending rows what was recorded before these were kept; return the days.

    A day is taken off the list and appended in one transaction, so each is added once.

    Raises:
        asyncpg.PostgresError: PostgreSQL refuses; days that are done stay so.
    """
    days = 0
    while await _backfill_day(connection):
        await fold(connection)
        days += 1
    return days


def usage_tasks() -> list[Task]:
    """Return what keeps the usage tables."""

    async def run_fold(connection: asyncpg.Connection) -> None:
        await fold(connection)

    async def run_backfill(connection: asyncpg.Connection) -> None:
        await backfill(connection)

    return [
        Task("usage", FOLD_EVERY_S, run_fold),
        Task("usage_backfill", BACKFILL_EVERY_S, run_backfill, timeout_s=3600.0),
    ]


async def _backfill_day(connection: asyncpg.Connection) -> bool:
    async with connection.transaction():
        day = await connection.fetchval(_query("take_day"))
        if day is None:
            return False
        await connection.execute(_query("make_room"), day)
        await connection.execute(_query("count_day"), day)
    return True


@cache
def _fold_sql() -> str:
    levels = [_level(table, unit, by) for table, (unit, by) in _TABLES.items()]
    return _query("fold").format(levels=", ".join(levels))


def _level(table: str, unit: str, by: tuple[str, ...]) -> str:
    return _query("level").format(
        table=table,
        keys=", ".join(("bucket", *by)),
        values=", ".join((f"date_trunc('{unit}', bucket, 'UTC')", *by)),
    )


def _query(name: str) -> str:
    return named_queries("serve_app.usage", "folding.sql")[name]
