"""The link that tests break passes on what happens to one end."""

from __future__ import annotations

import asyncio
import socket
import struct

import asyncpg

from serve_app.database import connect
from serve_app.settings import PostgresSettings
from tests.integration.links import Link

_TIMEOUT_S = 60.0
_GONE = "select not exists (select from pg_stat_activity where application_name = 'tests-reset')"


async def test_postgres_learns_that_its_client_was_reset(
    database: PostgresSettings, connection: asyncpg.Connection
) -> None:
    link = Link(database)
    await link.mend()
    client = await connect(link.settings, application_name="tests-reset")
    await client.transaction().start()
    _reset(client)
    async with asyncio.timeout(_TIMEOUT_S):
        while not await connection.fetchval(_GONE):  # noqa: ASYNC110  no event
            await asyncio.sleep(0.01)
    await link.cut()


def _reset(client: asyncpg.Connection) -> None:
    """End it as the death of a process does that had not read all: without a farewell."""
    transport = client._transport
    at_once = struct.pack("ii", 1, 0)
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
    transport.abort()
