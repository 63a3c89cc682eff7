"""Partitions are there before their month begins: a task of the upkeep."""

from __future__ import annotations

from typing import Protocol

import asyncpg

from serve_app.accounts.upkeep import Task
from serve_app.sql import named_queries

EVERY_S = 3600.0


class PartitionMetrics(Protocol):
    """Where the task tells what it found."""

    def partitions_ahead(self, months: int) -> None:
        """Months after this one that have all their partitions; -1 where this one has not."""
        ...


def partitions_task(metrics: PartitionMetrics) -> Task:
    """Return the task that makes the partitions of this month and of the next two.

    Where it fails, the default partitions take the rows, and the metric tells.
    """
    queries = named_queries("serve_app.accounts", "upkeep.sql")

    async def tell(connection: asyncpg.Connection) -> None:
        metrics.partitions_ahead(await connection.fetchval(queries["months_ahead"]))

    async def run(connection: asyncpg.Connection) -> None:
        try:
            await connection.execute(queries["ensure_partitions"])
        except asyncpg.PostgresError:
            await tell(connection)
            raise
        await tell(connection)

    return Task("partitions", EVERY_S, run)
