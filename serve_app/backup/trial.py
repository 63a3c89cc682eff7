"""Trying a backup: its file alone, its restore into a scratch database, and the whole drill."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from serve_app.backup.contents import query, read_contents
from serve_app.backup.create import Backups, session
from serve_app.backup.errors import BackupError
from serve_app.backup.folder import BackupFolder
from serve_app.backup.manifest import Contents, Manifest
from serve_app.backup.programs import PostgresPrograms
from serve_app.backup.restore import Restore, Restored, restore_dump
from serve_app.settings import PostgresSettings

# Lends an empty database.
Scratch = AbstractAsyncContextManager[PostgresSettings]


async def verify_file(manifest: Manifest, folder: BackupFolder, programs: PostgresPrograms) -> None:
    """Say nothing where the dump is what was written.

    Raises:
        BackupDamaged: it is not.
    """
    folder.check(manifest)
    await programs.check_dump(folder.dump(manifest.name))


async def verify_deep(
    manifest: Manifest,
    folder: BackupFolder,
    programs: PostgresPrograms,
    scratch: Scratch,
) -> Contents:
    """Restore into a scratch database and compare rows and audit chain with the manifest.

    Raises:
        BackupDamaged: the dump or what came of it is not what the manifest says.
        BackupError: there can be no scratch database, or pg_restore failed.
    """
    await verify_file(manifest, folder, programs)
    async with scratch as empty:
        return await restore_dump(manifest, folder, programs, empty)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drilled:
    """What a drill did, and how long it took in seconds.

    `damage` is what was found wrong after it was broken; None where it was not.
    """

    manifest: Manifest
    restored: Restored
    create_s: float
    restore_s: float
    damage: list[str] | None = None


async def drill(
    backups: Backups,
    server: PostgresSettings,
    restore_of: Callable[[Manifest], Restore],
    scratch: Scratch,
    *,
    breaks: bool = False,
) -> Drilled:
    """Make a backup, and restore it into a scratch database as after a loss.

    With `breaks` what was restored is then damaged, and restored once more.

    Raises:
        BackupError: what was lost could not be brought back; says why.
    """
    started = time.monotonic()
    manifest = await backups.create(server)
    created = time.monotonic()
    async with scratch as empty:
        restored = await restore_of(manifest).into(empty)
        restored_at = time.monotonic()
        damage = None
        if breaks:
            damage = await _broken(empty, manifest)
            restored = await restore_of(manifest).into(empty)
    return Drilled(
        manifest=manifest,
        restored=restored,
        create_s=created - started,
        restore_s=restored_at - created,
        damage=damage,
    )


async def _broken(scratch: PostgresSettings, manifest: Manifest) -> list[str]:
    """Damage a scratch database, and return how it differs from the backup.

    Raises:
        BackupError: it is not noticed.
    """
    async with session(scratch) as connection:
        await connection.execute(query("damage"))
        contents = await read_contents(connection)
    found = manifest.contents.differences(contents)
    if not found:
        raise BackupError(f"Damage was not noticed: {manifest.name} holds no request and no key.")
    return found
