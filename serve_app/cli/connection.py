"""The connection to PostgreSQL that a command works on."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

from serve_app.database import CONNECT_ERRORS, DatabaseUnavailable, connect
from serve_app.settings import PostgresSettings


@asynccontextmanager
async def connected(
    settings: PostgresSettings, application_name: str
) -> AsyncIterator[asyncpg.Connection]:
    """Lend a connection without a statement timeout: an operator's command may take its time.

    Raises:
        DatabaseUnavailable: PostgreSQL cannot be reached, breaks off, or lacks our tables.
    """
    connection = await connect(settings, application_name=application_name, statement_timeout_s=0)
    try:
        yield connection
    except asyncpg.UndefinedTableError as error:
        raise DatabaseUnavailable("A table is missing. Run `comp-ai migrate`.") from error
    except CONNECT_ERRORS as error:
        name = type(error).__name__
        raise DatabaseUnavailable(f"PostgreSQL broke off: {name}.") from error
    finally:
        # Not `close`: there may be nobody any more to say goodbye to.
        connection.terminate()
