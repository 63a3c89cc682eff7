"""Usage and searches: from the read replica, and from the primary while that is away."""

from __future__ import annotations

import asyncpg

from serve_app.read_pool import build_read_pool
from serve_app.settings import PostgresSettings
from tests.integration.links import Link


async def _port(connection: object) -> str:
    assert isinstance(connection, asyncpg.pool.PoolConnectionProxy)
    read_only: str = await connection.fetchval("show transaction_read_only")
    return read_only


async def test_the_replica_is_asked_and_the_primary_where_it_is_away(
    database: PostgresSettings,
) -> None:
    primary, replica = Link(database), Link(database)
    await primary.mend()
    await replica.mend()
    changes = {"read_host": "127.0.0.1", "read_port": replica.port}
    pool = build_read_pool(primary.settings.model_copy(update=changes), application_name="tests")
    # Nothing but the replica is needed, and nothing is written there.
    await primary.cut()
    assert await pool.read(_port) == "on"
    await primary.mend()
    await replica.cut()
    assert await pool.read(_port) == "on"
    await pool.close()
