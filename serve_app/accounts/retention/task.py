"""The retention as a task of the upkeep."""

from __future__ import annotations

import logging
from typing import Protocol

import asyncpg

from serve_app.accounts.retention.keeping import Expired, apply
from serve_app.accounts.retention.policy import DataClass, RetentionPolicy
from serve_app.accounts.retention.tables import TABLES, Table
from serve_app.accounts.upkeep import Task

logger = logging.getLogger(__name__)

EVERY_S = 3600.0
# It counts what goes, and moves what is held.
_TIMEOUT_S = 3600.0


class RetentionMetrics(Protocol):
    """Where the retention's measurements go."""

    def retention_removed(self, data: DataClass, partitions: int, rows: int) -> None:
        """So many whole partitions went, and so many rows with or without them; not both 0."""
        ...

    def oldest_row_age_s(self, data: DataClass, seconds: float) -> None:
        """How old the oldest row is now; 0 where there is none."""
        ...


def retention_task(policy: RetentionPolicy, metrics: RetentionMetrics) -> Task:
    """Return the task of the upkeep that removes what is past its time."""

    async def run(connection: asyncpg.Connection) -> None:
        async for done in apply(connection, policy):
            metrics.retention_removed(done.data, int(done.went), done.rows)
            _log(done)
        for data, table in TABLES.items():
            if await _exists(connection, table):
                age_s = await connection.fetchval(table.sql("oldest_age_s"))
                metrics.oldest_row_age_s(data, max(0.0, age_s or 0.0))

    return Task("retention", EVERY_S, run, timeout_s=_TIMEOUT_S)


async def _exists(connection: asyncpg.Connection, table: Table) -> bool:
    return await connection.fetchval("select to_regclass($1::text)", table.name) is not None


def _log(done: Expired) -> None:
    logger.info(
        "%d rows of %s went, %d are held",
        done.rows,
        done.partition,
        done.held_rows,
        extra={"action": "retention.removed"},
    )
