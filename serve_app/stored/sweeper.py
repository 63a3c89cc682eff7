"""Removing what is past its time from PostgreSQL, in small steps."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass

from serve_app.background import stop_tasks
from serve_app.errors import InvalidRequest, Unavailable
from serve_app.lazy_pool import LazyPool
from serve_app.sql import named_queries

logger = logging.getLogger(__name__)

EVERY_S = 60.0
BATCH_ROWS = 500


@dataclass(frozen=True, slots=True)
class Sweep:
    """A statement that deletes at most `$1` expired rows, safe to run twice at once."""

    name: str
    sql: str


_BATCHES = named_queries("serve_app.batches", "queries.sql")

SWEEPS = (
    Sweep("idempotency", named_queries("serve_app.stored", "idempotency.sql")["sweep"]),
    Sweep("responses", named_queries("serve_app.stored", "responses.sql")["sweep"]),
    Sweep("file chunks", _BATCHES["sweep_chunks"]),
    Sweep("files", _BATCHES["sweep_files"]),
    Sweep("batches", _BATCHES["sweep_batches"]),
)


class Sweeper:
    """Runs sweeps every `every_s`, each until it finds less than a batch."""

    def __init__(
        self,
        database: LazyPool,
        sweeps: Sequence[Sweep] = SWEEPS,
        *,
        every_s: float = EVERY_S,
        batch_rows: int = BATCH_ROWS,
    ) -> None:
        self._database = database
        self._sweeps = sweeps
        self._every_s = every_s
        self._batch_rows = batch_rows
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin; PostgreSQL may be away."""
        self._task = asyncio.create_task(self._sweep_for_ever(), name="sweeper")

    async def close(self) -> None:
        """Stop."""
        await stop_tasks(self._task)

    async def sweep(self) -> int:
        """Remove everything that is past its time now; return how many rows that were.

        Raises:
            Unavailable: PostgreSQL is away.
        """
        return sum([await self._sweep(sweep) for sweep in self._sweeps])

    async def _sweep(self, sweep: Sweep) -> int:
        removed = 0
        while True:
            async with self._database.connection() as connection:
                done = await connection.execute(sweep.sql, self._batch_rows)
            rows = int(done.rsplit(" ", 1)[1])  # "DELETE <rows>"
            removed += rows
            if rows < self._batch_rows:
                return removed

    async def _sweep_for_ever(self) -> None:
        while True:
            # Jitter: the gateways of one deployment start together.
            await asyncio.sleep(random.uniform(self._every_s / 2, self._every_s))  # noqa: S311
            try:
                removed = await self.sweep()
            except (Unavailable, InvalidRequest) as error:
                logger.warning(
                    "expired rows were not removed: %s",
                    type(error).__name__,
                    extra={"action": "sweep_failed"},
                )
                continue
            if removed:
                logger.info("%d expired rows were removed", removed, extra={"action": "sweep_done"})
