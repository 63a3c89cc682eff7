"""A database to try a backup in: made, lent and dropped."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

from serve_app.backup.create import session
from serve_app.backup.errors import BackupError
from serve_app.backup.restore import drop_schemas
from serve_app.settings import PostgresSettings

_PREFIX = "comp_ai_scratch_"
# Those of a run that was killed: nobody is in them.
_LEFTOVERS = """
select d.datname::text as name from pg_database d
where starts_with(d.datname, $1)
  and not exists (select from pg_stat_activity a where a.datname = d.datname)
"""

_HAS_SCHEMAS = (
    "select to_regnamespace('comp_ai') is not null or to_regnamespace('comp_ai_keys') is not null"
)


@asynccontextmanager
async def scratch_database(
    settings: PostgresSettings, maker: PostgresSettings
) -> AsyncIterator[PostgresSettings]:
    """Lend an empty database on the server of `settings`, owned by its role.

    Args:
        maker: who may make and drop databases, and where it logs in.

    Raises:
        BackupError: it may not.
    """
    name = f"{_PREFIX}{secrets.token_hex(6)}"
    await _drop_leftovers(maker)
    await _make(maker, name, settings.user)
    try:
        yield settings.model_copy(update={"database": name})
    finally:
        async with session(maker) as connection:
            await _drop(connection, name)


@asynccontextmanager
async def given_database(settings: PostgresSettings, name: str) -> AsyncIterator[PostgresSettings]:
    """Lend the database `name`, which somebody else made; it is empty again afterwards.

    Raises:
        BackupError: it is not empty.
    """
    given = settings.model_copy(update={"database": name})
    async with session(given) as connection:
        if await connection.fetchval(_HAS_SCHEMAS):
            raise BackupError(f"The database {name!r} is not empty: it has a schema of ours.")
    try:
        yield given
    finally:
        async with session(given) as connection:
            await drop_schemas(connection)


async def _make(maker: PostgresSettings, name: str, owner: str) -> None:
    statement = await _statement(
        maker, "create database %I owner %I template template0 encoding 'UTF8'", name, owner
    )
    async with session(maker) as connection:
        try:
            await connection.execute(statement)
        except asyncpg.InsufficientPrivilegeError:
            raise BackupError(
                f"The role {maker.user!r} may not make a database to restore into. "
                f'Allow it (alter role "{maker.user}" createdb), or name an empty one with '
                "--scratch."
            ) from None


async def _drop_leftovers(maker: PostgresSettings) -> None:
    async with session(maker) as connection:
        for row in await connection.fetch(_LEFTOVERS, _PREFIX):
            await _drop(connection, row["name"])


async def _drop(connection: asyncpg.Connection, name: str) -> None:
    # Made by us of a prefix and hexadecimal digits; `force` ends a pg_restore that was cut off.
    await connection.execute(f'drop database if exists "{name}" with (force)')


async def _statement(maker: PostgresSettings, form: str, *names: str) -> str:
    async with session(maker) as connection:
        statement: str = await connection.fetchval(
            "select format($1, variadic $2::text[])", form, names
        )
    return statement
