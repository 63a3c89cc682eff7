"""Who waits for a lock in the database of a test."""

from __future__ import annotations

import asyncio

import asyncpg

from serve_app.database import connect
from serve_app.settings import PostgresSettings

_PATIENCE_S = 60.0


async def who_waits(connection: asyncpg.Connection) -> list[str]:
    """Return the application names of the sessions that wait for a lock now."""
    # A transaction sees the activity as it was when it first looked.
    await connection.execute("select pg_stat_clear_snapshot()")
    rows = await connection.fetch(
        "select application_name from pg_stat_activity "
        "where wait_event_type = 'Lock' and datname = current_database()"
    )
    return [row["application_name"] for row in rows]


async def lock_awaited(database: PostgresSettings, sessions: int = 1) -> list[str]:
    """Return once so many sessions wait for a lock: their application names.

    It looks through a connection of its own, whatever state those of the test are in.

    Raises:
        TimeoutError: it does not come to that.
    """
    watcher = await connect(database, application_name="tests-watcher")
    try:
        async with asyncio.timeout(_PATIENCE_S):
            while len(who := await who_waits(watcher)) < sessions:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            return who
    finally:
        await watcher.close()
