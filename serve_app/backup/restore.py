"""Bringing a backup back: into the database, or into one that is only there to try it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from serve_app.audit.act import Actor, AuditAct
from serve_app.audit.log import AuditLog
from serve_app.audit.verify import verify
from serve_app.backup.contents import count_rows, query, read_contents
from serve_app.backup.create import as_encrypted, session
from serve_app.backup.errors import BackupDamaged, BackupError
from serve_app.backup.folder import BackupFolder
from serve_app.backup.keyring import KeyRing, put_ring
from serve_app.backup.manifest import Contents, Manifest
from serve_app.backup.programs import PostgresPrograms
from serve_app.database import migrate
from serve_app.settings import PostgresSettings

_SCHEMAS = ("comp_ai", "comp_ai_keys")
_ASIDE = "_replaced"
# What migrations put there by themselves.
_HAVE_ROWS_ALWAYS = {"schema_migrations", "audit_head", "installation"}

# Does again what was erased since the backup; returns how many subjects that were.
Reapply = Callable[[asyncpg.Connection], Awaitable[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What a restore did."""

    rows: dict[str, int]
    audit_rows: int
    migrated: list[str]
    keys: dict[str, int]
    erased_again: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Restore:
    """One restore of `manifest`, whose dump lies in `folder`.

    Args:
        ring: the newest generation, or None to do without it.
        migrations: the folder of the migrations.
        reapply: does again what the ring says was erased.
    """

    manifest: Manifest
    folder: BackupFolder
    programs: PostgresPrograms
    ring: KeyRing | None
    migrations: Path
    reapply: Reapply
    actor: Actor

    async def into(self, target: PostgresSettings) -> Restored:
        """Restore into `target`; whatever its schemas held is gone afterwards.

        Raises:
            BackupError: it failed; `target` is as it was.
            BackupDamaged: what was restored is not what the manifest says; as above.
        """
        async with session(target) as connection, _aside(connection):
            contents = await restore_dump(self.manifest, self.folder, self.programs, target)
            applied = await migrate(target, directory=self.migrations, actor=self.actor)
            erased = await self._bring_keys(connection)
            restored = Restored(
                rows=contents.rows,
                audit_rows=contents.audit.seq,
                migrated=[migration.label for migration in applied],
                keys={} if self.ring is None else self.ring.rows,
                erased_again=erased,
            )
            await self._finish(connection, restored)
        return restored

    async def _bring_keys(self, connection: asyncpg.Connection) -> int:
        if self.ring is None:
            return 0
        await put_ring(connection, self.ring)
        return await self.reapply(connection)

    async def _finish(self, connection: asyncpg.Connection, restored: Restored) -> None:
        """Drop what was set aside, and say so in the audit log: both or neither."""
        act = AuditAct(
            actor=self.actor,
            action="backup.restore",
            target=self.manifest.name,
            after={
                "sha256": self.manifest.dump.sha256,
                "migrated": restored.migrated,
                "keyring": None if self.ring is None else self.ring.written_at.isoformat(),
                "erased_again": restored.erased_again,
            },
        )
        async with connection.transaction():
            await drop_schemas(connection, [f"{schema}{_ASIDE}" for schema in _SCHEMAS])
            await AuditLog().append(connection, act)
        await connection.execute("analyze")


async def restore_dump(
    manifest: Manifest,
    folder: BackupFolder,
    programs: PostgresPrograms,
    target: PostgresSettings,
) -> Contents:
    """Restore a dump where its schemas are not, and compare all of it with its manifest.

    Raises:
        BackupDamaged: the dump or what came of it is not what the manifest says.
        BackupError: the server is too old, or pg_restore failed.
    """
    async with session(target) as connection:
        await _check_server(connection, manifest, programs)
        folder.check(manifest)
        same = await as_encrypted(connection, target)
        await programs.restore(same, folder.dump(manifest.name))
        contents = await read_contents(connection)
        wrong = manifest.contents.differences(contents)
        verdict = await verify(connection, manifest.contents.audit.link)
    wrong += [f"audit row {fault.seq}: {fault.message}" for fault in verdict.faults[:5]]
    if wrong:
        raise BackupDamaged(f"{manifest.name} was not restored as it was: {'; '.join(wrong)}.")
    return contents


async def check_target(connection: asyncpg.Connection, *, replace: bool) -> None:
    """Say nothing where a backup may be restored here.

    Raises:
        BackupError: somebody is connected, or there are rows and `replace` is not set.
    """
    await undo_broken_off(connection)
    others = await connection.fetchval(query("other_sessions"))
    if others:
        raise BackupError(
            f"{others} other sessions are in the database: stop the service first. "
            "What it writes during a restore would be lost."
        )
    if not replace and (tables := await _tables_with_rows(connection)):
        raise BackupError(
            f"The database has rows ({', '.join(tables)}). Name an empty database in POSTGRES_DB, "
            "or use --replace, which makes a backup of it first."
        )


async def undo_broken_off(connection: asyncpg.Connection) -> None:
    """Put back what a restore that was killed had set aside, in the place of what it brought."""
    async with connection.transaction():
        if await _exists(connection, f"comp_ai{_ASIDE}"):
            await _put_back(connection)


async def _check_server(
    connection: asyncpg.Connection, manifest: Manifest, programs: PostgresPrograms
) -> None:
    server = connection.get_server_version().major
    if server < manifest.contents.server_major:
        raise BackupError(
            f"{manifest.name} is of PostgreSQL {manifest.contents.server}, and this server is "
            f"{server}, which is older."
        )
    await programs.check(max(server, int(manifest.dump.program.split(".", 1)[0])))


async def _tables_with_rows(connection: asyncpg.Connection) -> list[str]:
    counted = await count_rows(connection)
    return sorted(name for name, rows in counted.items() if rows and name not in _HAVE_ROWS_ALWAYS)


@asynccontextmanager
async def _aside(connection: asyncpg.Connection) -> AsyncIterator[None]:
    """Set our schemas aside; put them back where the work fails."""
    async with connection.transaction():
        for schema in _SCHEMAS:
            if await _exists(connection, schema):
                await connection.execute(f"alter schema {schema} rename to {schema}{_ASIDE}")
    try:
        yield
    except BaseException:
        with contextlib.suppress(asyncpg.InterfaceError, OSError):
            async with connection.transaction():
                await _put_back(connection)
        raise


async def _put_back(connection: asyncpg.Connection) -> None:
    await drop_schemas(connection)
    for schema in _SCHEMAS:
        if await _exists(connection, f"{schema}{_ASIDE}"):
            await connection.execute(f"alter schema {schema}{_ASIDE} rename to {schema}")


async def drop_schemas(connection: asyncpg.Connection, schemas: Collection[str] = _SCHEMAS) -> None:
    """Drop schemas and all that is in them."""
    for schema in schemas:
        await connection.execute(f"drop schema if exists {schema} cascade")


async def _exists(connection: asyncpg.Connection, schema: str) -> bool:
    return await connection.fetchval("select to_regnamespace($1)", schema) is not None
