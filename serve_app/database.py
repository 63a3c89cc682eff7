"""The way to PostgreSQL: connections, and the migrations of the schema.

What asyncpg and the operating system raise while connecting is turned into
`DatabaseUnavailable` here, with a message that never holds the password.
"""

from __future__ import annotations

import hashlib
import re
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import asyncpg

from serve_app.audit.act import Actor, AuditAct
from serve_app.audit.log import AuditLog
from serve_app.errors import CompAIError, ConfigError
from serve_app.settings import PostgresSettings

CONNECT_TIMEOUT_S = 10.0
# Requests wait for it: two packets that were lost, not a host that is gone.
_POOL_CONNECT_TIMEOUT_S = 5.0
STATEMENT_TIMEOUT_S = 30.0
# A migration that waits for a lock stops everybody behind it in the queue for that lock.
MIGRATION_LOCK_TIMEOUT_S = 10.0
_ADVISORY_LOCK = 0x636F6D705F6169  # "comp_ai" in ASCII
_FILE_NAME = re.compile(r"^(?P<version>\d{4})_(?P<name>[a-z0-9_]+)\.sql$")

CONNECT_ERRORS = (
    OSError,  # TimeoutError and ssl.SSLError are among its subclasses
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
)


class DatabaseUnavailable(CompAIError):
    """PostgreSQL cannot be reached."""


class MigrationError(CompAIError):
    """The schema cannot be migrated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """One numbered file of plain SQL."""

    version: int
    name: str
    sql: str

    @property
    def label(self) -> str:
        """Number and name, as the file has them."""
        return f"{self.version:04}_{self.name}"

    @property
    def sha256(self) -> str:
        """Checksum of the text, in hexadecimal."""
        return hashlib.sha256(self.sql.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """One migration that a database has."""

    version: int
    name: str
    sha256: str
    applied_at: datetime


async def connect(
    settings: PostgresSettings,
    *,
    application_name: str,
    statement_timeout_s: float = STATEMENT_TIMEOUT_S,
    connect_timeout_s: float = CONNECT_TIMEOUT_S,
) -> asyncpg.Connection:
    """Open one connection; its session speaks UTC. A statement timeout of 0 is none.

    PostgreSQL waits as long for the next statement of a transaction, and then ends it: over a
    link that went dead it would not see that we are gone, and hold our locks for hours.

    Raises:
        DatabaseUnavailable: no server there, or it refuses us; says which and why.
    """
    arguments = _arguments(settings, application_name, statement_timeout_s, connect_timeout_s)
    try:
        return await asyncpg.connect(**arguments)
    except CONNECT_ERRORS as error:
        raise DatabaseUnavailable(_explain(error, settings)) from error


async def create_pool(
    settings: PostgresSettings,
    *,
    min_size: int,
    max_size: int,
    application_name: str,
    statement_timeout_s: float = STATEMENT_TIMEOUT_S,
    server_settings: Mapping[str, str] | None = None,
) -> asyncpg.Pool:
    """Open a pool; `min_size` connections are made at once, 0 defers every failure.

    `server_settings` hold in its sessions beside our own. What a use changes in its session stays:
    only an open transaction is ended when a connection is given back.

    Raises:
        DatabaseUnavailable: no server there, or it refuses us; says which and why.
    """
    arguments = _arguments(settings, application_name, statement_timeout_s, _POOL_CONNECT_TIMEOUT_S)
    arguments["server_settings"] |= server_settings or {}
    try:
        return await asyncpg.create_pool(
            min_size=min_size, max_size=max_size, reset=_keep_session, **arguments
        )
    except CONNECT_ERRORS as error:
        raise DatabaseUnavailable(_explain(error, settings)) from error


async def _keep_session(_: asyncpg.Connection) -> None:
    """Do nothing, in the place of asyncpg's query that resets what a use may have set.

    It costs a round trip each time, and nothing of ours in a pool sets what outlives its
    transaction. asyncpg has ended an open transaction before.
    """


def _arguments(
    settings: PostgresSettings,
    application_name: str,
    statement_timeout_s: float,
    connect_timeout_s: float,
) -> dict[str, Any]:
    password = settings.password
    timeout_ms = str(round(statement_timeout_s * 1000))
    return {
        "host": settings.host,
        "port": settings.port,
        "user": settings.user,
        "database": settings.database,
        "password": password.get_secret_value() if password is not None else None,
        "ssl": _ssl(settings),
        "timeout": connect_timeout_s,
        "server_settings": {
            "application_name": application_name,
            "statement_timeout": timeout_ms,
            "idle_in_transaction_session_timeout": timeout_ms,
            "timezone": "UTC",
        },
    }


def _ssl(settings: PostgresSettings) -> bool | str | ssl.SSLContext:
    """Translate libpq's sslmode; the CAs are those of POSTGRES_SSLROOTCERT or the system's.

    Raises:
        DatabaseUnavailable: POSTGRES_SSLROOTCERT can be read no more.
    """
    if settings.sslmode == "disable" or settings.host.startswith("/"):
        return False  # libpq does not encrypt a Unix socket either
    if settings.sslmode in ("prefer", "require"):
        return settings.sslmode
    context = _trusting(settings.sslrootcert)
    context.check_hostname = settings.sslmode == "verify-full"
    return context


def _trusting(file: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=file)
    except OSError as error:  # ssl.SSLError is among its subclasses
        name = type(error).__name__
        raise DatabaseUnavailable(f"POSTGRES_SSLROOTCERT cannot be read: {name}.") from error


def _explain(error: Exception, settings: PostgresSettings) -> str:
    where = f"PostgreSQL at {settings.host}:{settings.port}"
    if isinstance(error, asyncpg.InvalidAuthorizationSpecificationError):
        return (
            f"{where} refuses the role {settings.user!r}. "
            "Check POSTGRES_USER, POSTGRES_PASSWORD and the server's pg_hba.conf."
        )
    if isinstance(error, asyncpg.InvalidCatalogNameError):
        return f"{where} has no database {settings.database!r}. Create it or check POSTGRES_DB."
    if isinstance(error, ssl.SSLError):
        return f"{where}: TLS failed with POSTGRES_SSLMODE={settings.sslmode}: {error.reason}."
    if isinstance(error, TimeoutError):
        return f"{where} did not answer in time. Check POSTGRES_HOST and POSTGRES_PORT."
    if isinstance(error, OSError):
        reason = error.strerror or type(error).__name__
        return f"{where} cannot be reached: {reason}. Check POSTGRES_HOST and POSTGRES_PORT."
    return f"{where} refuses the connection: {type(error).__name__}."


def read_migrations(directory: Path) -> list[Migration]:
    """Return the migrations of `directory`, oldest first.

    Raises:
        ConfigError: no folder, no files, a file whose name is not `NNNN_name.sql`,
            or one number twice.
    """
    found: dict[int, Migration] = {}
    for path in sorted(directory.glob("*.sql")):
        match = _FILE_NAME.match(path.name)
        version = int(match["version"]) if match else 0
        if match is None or version < 1 or version in found:
            raise ConfigError("migrations", path.name, "one file NNNN_name.sql for each number")
        found[version] = Migration(
            version=version, name=match["name"], sql=path.read_text(encoding="utf-8")
        )
    if not found:
        raise ConfigError("migrations", str(directory), "a folder that holds NNNN_name.sql files")
    return list(found.values())


async def plan(settings: PostgresSettings, *, directory: Path) -> list[Migration]:
    """Return the migrations that the database lacks, oldest first; changes nothing.

    Raises:
        ConfigError: the folder is not one of migrations.
        DatabaseUnavailable: PostgreSQL cannot be reached.
        MigrationError: an applied file was changed, removed or is out of order.
    """
    migrations = read_migrations(directory)
    async with _connected(settings) as connection:
        return _pending(migrations, await _applied(connection))


async def migrate(
    settings: PostgresSettings, *, directory: Path, actor: Actor | None = None
) -> list[Migration]:
    """Apply the migrations that the database lacks, each in a transaction; return them.

    With an `actor` each is in the audit log, from the one on that makes it.

    Two runners at once are safe: the second waits for the first and finds nothing to do.

    Raises:
        ConfigError: the folder is not one of migrations.
        DatabaseUnavailable: PostgreSQL cannot be reached.
        MigrationError: an applied file was changed, removed or is out of order, or one
            failed; those before it stay applied.
    """
    migrations = read_migrations(directory)
    async with _connected(settings) as connection:
        # The session holds this until it ends, so a runner that dies does not keep it.
        await connection.execute("select pg_advisory_lock($1)", _ADVISORY_LOCK)
        await _create_registry(connection)
        pending = _pending(migrations, await _applied(connection))
        for migration in pending:
            await _apply(connection, migration, actor)
    return pending


@asynccontextmanager
async def _connected(settings: PostgresSettings) -> AsyncIterator[asyncpg.Connection]:
    # No statement timeout: building an index may take its time, and so may the other runner.
    connection = await connect(settings, application_name="comp-ai migrate", statement_timeout_s=0)
    try:
        yield connection
    finally:
        await connection.close()


async def _create_registry(connection: asyncpg.Connection) -> None:
    await connection.execute(
        """
        create schema if not exists comp_ai;
        create table if not exists comp_ai.schema_migrations (
            version     integer     primary key,
            name        text        not null,
            sha256      text        not null,
            applied_at  timestamptz not null default now()
        );
        """
    )


async def _applied(connection: asyncpg.Connection) -> dict[int, Applied]:
    if await connection.fetchval("select to_regclass('comp_ai.schema_migrations')") is None:
        return {}
    rows = await connection.fetch(
        "select version, name, sha256, applied_at from comp_ai.schema_migrations"
    )
    return {row["version"]: Applied(**dict(row)) for row in rows}


def _pending(migrations: list[Migration], applied: dict[int, Applied]) -> list[Migration]:
    newest_known = migrations[-1].version
    known = {migration.version for migration in migrations}
    for version, row in applied.items():
        # Newer ones than we know are fine: this is the previous release after a rollback.
        if version not in known and version < newest_known:
            raise MigrationError(
                f"The database has migration {version:04}_{row.name}, and its file is gone."
            )
    for migration in migrations:
        _check(migration, applied)
    return [migration for migration in migrations if migration.version not in applied]


def _check(migration: Migration, applied: dict[int, Applied]) -> None:
    label = migration.label
    row = applied.get(migration.version)
    if row is not None and row.sha256 != migration.sha256:
        raise MigrationError(
            f"Migration {label} was changed after it was applied on {row.applied_at:%Y-%m-%d}. "
            "Restore the file and put the change into a new migration."
        )
    if row is None and any(version > migration.version for version in applied):
        raise MigrationError(
            f"Migration {label} is older than one that the database already has. "
            "Give it the next free number."
        )


async def _apply(connection: asyncpg.Connection, migration: Migration, actor: Actor | None) -> None:
    label = migration.label
    try:
        async with connection.transaction():
            await connection.execute(
                "select set_config('lock_timeout', $1, true)",
                str(round(MIGRATION_LOCK_TIMEOUT_S * 1000)),
            )
            await connection.execute(migration.sql)
            await connection.execute(
                "insert into comp_ai.schema_migrations (version, name, sha256) values ($1, $2, $3)",
                migration.version,
                migration.name,
                migration.sha256,
            )
            if actor is not None:
                await _note(connection, label, migration, actor)
    except asyncpg.PostgresError as error:
        raise MigrationError(f"Migration {label} failed and was undone: {error}") from error


async def _note(
    connection: asyncpg.Connection, label: str, migration: Migration, actor: Actor
) -> None:
    if await connection.fetchval("select to_regclass('comp_ai.audit_head')") is None:
        return
    after = {"sha256": migration.sha256}
    act = AuditAct(actor=actor, action="schema.migrate", target=label, after=after)
    await AuditLog().append(connection, act)
