"""Making a backup: one snapshot, dumped, counted and read back."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from serve_app.audit.act import Actor, AuditAct
from serve_app.audit.log import AuditLog
from serve_app.backup.contents import query, read_contents
from serve_app.backup.errors import BackupError
from serve_app.backup.folder import BackupFolder, measure
from serve_app.backup.keyring import KeyRingFile
from serve_app.backup.manifest import Contents, DumpFile, Manifest, name_at
from serve_app.backup.programs import PostgresPrograms
from serve_app.backup.scheme import KeepScheme
from serve_app.database import CONNECT_ERRORS, DatabaseUnavailable, connect
from serve_app.records import utc_now
from serve_app.settings import PostgresSettings


@dataclass(frozen=True, slots=True)
class Backups:
    """The backups of one installation: where they lie, and by what they are made."""

    folder: BackupFolder
    programs: PostgresPrograms
    actor: Actor

    async def create(self, settings: PostgresSettings) -> Manifest:
        """Make a backup and read it back; the key ring is written anew.

        Raises:
            BackupError: it failed; nothing of it is left, and the backups before are untouched.
            ConfigError: the folder or the programs will not do.
            DatabaseUnavailable: PostgreSQL is away.
        """
        self.folder.prepare()
        with self.folder.locked():
            self.folder.remove_leftovers()
            async with session(settings) as connection:
                return await self._create(settings, connection)

    def prune(self, scheme: KeepScheme, *, dry_run: bool = False) -> list[str]:
        """Remove the backups that `scheme` does not keep; return their names, oldest first.

        One that cannot be read is never removed, and does not count.

        Raises:
            BackupError: another process makes a backup.
        """
        with self.folder.locked():
            taken = {one.created_at: one.name for one in self.folder.manifests()}
            kept = scheme.kept(taken, utc_now())
            surplus = sorted(name for at, name in taken.items() if at not in kept)
            for name in () if dry_run else surplus:
                self.folder.remove(name)
        return surplus

    async def _create(self, settings: PostgresSettings, connection: asyncpg.Connection) -> Manifest:
        created_at = utc_now()
        name = name_at(created_at)
        partial = self.folder.partial(name)
        _make_private(partial)
        try:
            contents, program = await self._dump(settings, connection, partial)
            length, sha256 = await asyncio.to_thread(measure, partial)
            await self.programs.check_dump(partial)
            manifest = Manifest(
                name=name,
                created_at=created_at,
                verified_at=utc_now(),
                contents=contents,
                dump=DumpFile(sha256=sha256, bytes=length, program=program),
            )
            await self._note(connection, manifest)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        self.folder.finish(manifest)
        return manifest

    async def _dump(
        self, settings: PostgresSettings, connection: asyncpg.Connection, file: Path
    ) -> tuple[Contents, str]:
        ring = KeyRingFile(self.folder.path)
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            contents = await read_contents(connection)
            ring.check_owner(contents.installation)
            program = await self.programs.check(contents.server_major)
            snapshot = await connection.fetchval("select pg_export_snapshot()")
            # The transaction stays open as long as pg_dump reads its snapshot.
            same = await as_encrypted(connection, settings)
            await self.programs.dump(same, file, snapshot=snapshot)
        # After the dump: each key that seals something in it is in the ring.
        await ring.rewrite(connection)
        return contents, program

    async def _note(self, connection: asyncpg.Connection, manifest: Manifest) -> None:
        act = AuditAct(
            actor=self.actor,
            action="backup.create",
            target=manifest.name,
            after={"sha256": manifest.dump.sha256, "bytes": manifest.dump.bytes},
        )
        async with connection.transaction():
            await AuditLog().append(connection, act)


@asynccontextmanager
async def session(settings: PostgresSettings) -> AsyncIterator[asyncpg.Connection]:
    """Lend a connection that may take its time.

    Raises:
        DatabaseUnavailable: PostgreSQL is away, or went away.
        BackupError: PostgreSQL refuses what is asked of it.
    """
    connection = await connect(settings, application_name="comp-ai backup", statement_timeout_s=0)
    try:
        yield connection
    except asyncpg.PostgresConnectionError as error:
        raise DatabaseUnavailable(f"PostgreSQL broke off: {type(error).__name__}.") from error
    except asyncpg.PostgresError as error:
        raise BackupError(f"PostgreSQL refuses it: {type(error).__name__}.") from error
    except CONNECT_ERRORS as error:
        raise DatabaseUnavailable(f"PostgreSQL broke off: {type(error).__name__}.") from error
    finally:
        # Not `close`: there may be nobody any more to say goodbye to.
        connection.terminate()


async def as_encrypted(
    connection: asyncpg.Connection, settings: PostgresSettings
) -> PostgresSettings:
    """Return `settings` so that a program encrypts where our own connection is encrypted.

    With `prefer` one whose libpq cannot encrypt would send everything in the clear.
    """
    if settings.sslmode == "prefer" and await connection.fetchval(query("encrypted")):
        return settings.model_copy(update={"sslmode": "require"})
    return settings


def _make_private(file: Path) -> None:
    os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
