"""Whether the accounts add up: the tokens in the log beside those that the engines counted.

Each model replica tells its counters every few seconds and when it stops; each reading is kept.
Between two readings of one replica the log must hold what the counters grew by. Requests that
were under way at a reading are in the counters in part, so the log gives two bounds: the tokens
of the requests that began and ended in between, and those with the ones that were under way.
Drift is what lies outside of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol

import asyncpg

from serve_app.accounts.upkeep import Task
from serve_app.engine_counters import EngineCounters
from serve_app.lazy_pool import LazyPool
from serve_app.sql import named_queries

EVERY_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftConfig:
    """What is compared.

    Args:
        stretch_s: how far back.
        idle_after_s: how old a reading of an idle engine must be: by then the rows of its
            requests are in PostgreSQL.
        busy_after_s: the same of an engine at work, whose requests have to end first. Longer
            than the longest request.
        longest_s: no request takes longer.
        keep_s: older readings are dropped.
    """

    stretch_s: float = 24 * 3600.0
    idle_after_s: float = 60.0
    busy_after_s: float = 900.0
    longest_s: float = 24 * 3600.0
    keep_s: float = 25 * 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReading:
    """What one replica counted from `started_at` to `at`."""

    model: str
    started_at: datetime
    at: datetime
    counters: EngineCounters


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDrift:
    """The accounts of one model, over the replicas that were heard of.

    Args:
        engine_tokens: prompt and completion tokens by the engines' counters.
        log_tokens: those of the requests in the log that certainly are in the counters.
        open_tokens: those of the requests that are in them in part, or may be.
    """

    model: str
    replicas: int
    engine_tokens: int
    log_tokens: int
    open_tokens: int

    @property
    def tokens(self) -> int:
        """How many tokens the log has too many; negative where it lacks some."""
        too_many = max(0, self.log_tokens - self.engine_tokens)
        lacking = max(0, self.engine_tokens - self.log_tokens - self.open_tokens)
        return too_many - lacking

    @property
    def ratio(self) -> float:
        """The same as a part of what the engines counted."""
        return self.tokens / max(1, self.engine_tokens)


class DriftMetrics(Protocol):
    """Where the task tells what it found."""

    def accounting_drift(self, ratios: Mapping[str, float]) -> None:
        """Drift by model; models that are not among them have none that is known."""
        ...


class EngineCounts:
    """Keeps readings in PostgreSQL."""

    def __init__(self, pool: LazyPool) -> None:
        self._pool = pool

    async def note(self, reading: EngineReading) -> None:
        """Keep `reading`; a repeat changes nothing. One that is lost is made up by the next.

        Raises:
            Unavailable: PostgreSQL is away.
        """
        counters = reading.counters
        at_work = counters.requests_running + counters.requests_waiting
        # A lease is held for a request from before that goes out until its answer has ended.
        at_work = max(at_work, counters.live_leases - counters.resting_leases)
        async with self._pool.connection() as connection:
            await connection.execute(
                _query("note"),
                counters.replica_id,
                reading.at,
                reading.model,
                reading.started_at,
                counters.prompt_tokens,
                counters.completion_tokens,
                at_work,
            )

    async def close(self) -> None:
        """Close the pool."""
        await self._pool.close()


async def read_drift(
    connection: asyncpg.Connection, config: DriftConfig | None = None
) -> list[ModelDrift]:
    """Return the drift of each model that has readings, by name."""
    wanted = config or DriftConfig()
    rows = await connection.fetch(
        _query("drift"),
        timedelta(seconds=wanted.stretch_s),
        timedelta(seconds=wanted.idle_after_s),
        timedelta(seconds=wanted.busy_after_s),
        timedelta(seconds=wanted.longest_s),
    )
    return [ModelDrift(**dict(row)) for row in rows]


def drift_task(metrics: DriftMetrics, config: DriftConfig | None = None) -> Task:
    """Return the task that compares, tells, and drops old readings."""
    wanted = config or DriftConfig()

    async def run(connection: asyncpg.Connection) -> None:
        found = await read_drift(connection, wanted)
        metrics.accounting_drift({drift.model: drift.ratio for drift in found})
        await connection.execute(_query("forget"), timedelta(seconds=wanted.keep_s))

    return Task("drift", EVERY_S, run)


def _query(name: str) -> str:
    return named_queries("serve_app.accounts", "drift.sql")[name]
