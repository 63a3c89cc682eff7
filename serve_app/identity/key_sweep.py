"""API keys that ended long ago go, as a task of the upkeep.

What a key made stays: requests, usage and the audit log hold its id, and need no row of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import asyncpg

from serve_app.accounts.retention.keeping import DROP, SERVICE
from serve_app.accounts.upkeep import Task
from serve_app.audit.act import Actor, AuditAct
from serve_app.audit.log import AuditLog
from serve_app.identity.api_keys import query

EVERY_S = 3600.0
# The gateways are told of each.
_STEP_ROWS = 500


# Where the configuration says nothing.
DEFAULT_DAYS = 400


@dataclass(frozen=True, slots=True)
class EndedKeys:
    """Keys and earlier secrets that are past their time; `held_rows` stay under a legal hold."""

    rows: int
    held_rows: int


class KeySweepMetrics(Protocol):
    """Where the sweep's measurements go."""

    def ended_keys_removed(self, rows: int) -> None:
        """So many rows went; not 0."""
        ...


def key_sweep_task(days: int, metrics: KeySweepMetrics) -> Task:
    """Return the task that removes keys and earlier secrets which ended more than `days` ago."""

    async def run(connection: asyncpg.Connection) -> None:
        while rows := await _sweep_some(connection, days, SERVICE):
            metrics.ended_keys_removed(rows)

    return Task("api_keys", EVERY_S, run)


async def count_ended(connection: asyncpg.Connection, days: int) -> EndedKeys:
    """Return how many keys ended more than `days` ago."""
    row = await connection.fetchrow(query("count_ended"), days)
    assert row is not None
    return EndedKeys(row["rows"], row["held_rows"])


async def remove_ended(connection: asyncpg.Connection, days: int, by: Actor) -> EndedKeys:
    """Remove the keys that ended more than `days` ago; return what went and what is held."""
    removed = 0
    while rows := await _sweep_some(connection, days, by):
        removed += rows
    return EndedKeys(removed, (await count_ended(connection, days)).held_rows)


async def _sweep_some(connection: asyncpg.Connection, days: int, by: Actor) -> int:
    async with connection.transaction():
        await connection.execute(query("keep_out_holds"))
        done = await connection.execute(query("sweep_ended"), days, _STEP_ROWS)
        rows = int(done.rsplit(" ", 1)[1])  # "DELETE <rows>"
        if rows:
            after = {"data": "api_keys", "rows": rows}
            act = AuditAct(actor=by, action=DROP, target="comp_ai.api_keys", after=after)
            await AuditLog().append(connection, act)
    return rows
