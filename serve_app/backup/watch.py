"""The upkeep's look at the backups: how old the newest is, and whether the key ring is current."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path
from typing import Protocol

import asyncpg

from serve_app.accounts.upkeep import Task
from serve_app.backup.contents import query
from serve_app.backup.folder import BackupFolder
from serve_app.backup.keyring import KeyRingFile
from serve_app.backup.manifest import Manifest
from serve_app.records import utc_now

EVERY_S = 60.0


class BackupMetrics(Protocol):
    """Where the task tells what it found."""

    def backup_age_s(self, seconds: float | None) -> None:
        """Age of the newest verified backup; None where there is none to be seen from here."""
        ...


def backup_task(path: Path, metrics: BackupMetrics) -> Task:
    """Return the task; where `path` is no folder of this machine it does nothing.

    All do it: on several hosts the one that holds the lock may not be the one with the folder.

    After an erasure it writes the key ring anew, so that the key that was destroyed goes from
    there too without anybody's doing.
    """
    folder, ring = BackupFolder(path), KeyRingFile(path)
    in_ring: asyncpg.Record | None = None

    async def run(connection: asyncpg.Connection) -> None:
        nonlocal in_ring
        installation = await connection.fetchval(query("installation"))
        newest = await asyncio.to_thread(_newest, folder, installation)
        metrics.backup_age_s(
            None if newest is None else (utc_now() - newest.created_at).total_seconds()
        )
        if newest is None:
            return
        erased = await connection.fetchrow(query("erasures"))
        if erased != in_ring:
            await ring.rewrite(connection)
            in_ring = erased

    return Task("backup", EVERY_S, run, by_all=True)


def _newest(folder: BackupFolder, installation: uuid.UUID) -> Manifest | None:
    found = (one for one in folder.manifests() if one.contents.installation == installation)
    return next(found, None)
