"""Who waits for a lock in the database of a test."""

from __future__ import annotations

import asyncio

from serve_app.database import connect
from serve_app.settings import PostgresSettings

_PATIENCE_S = 60.0
_WAITING = (
    "select application_name from pg_stat_activity "
    "where wait_event_type = 'Lock' and datname = current_database()"
)


async def lock_awaited(database: PostgresSettings, sessions: int = 1) -> list[str]:
    """Return once so many sessions wait for a lock: their application names.

    It looks through a connection of its own: a transaction sees the sessions as they were when it
    first looked.

    Raises:
        TimeoutError: it does not come to that.
    """
    watcher = await connect(database, application_name="tests-watcher")
    try:
        async with asyncio.timeout(_PATIENCE_S):
            while len(waiting := await watcher.fetch(_WAITING)) < sessions:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            return [row["application_name"] for row in waiting]
    finally:
        await watcher.close()
