"""`comp-ai backup`: what the commands do and print."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import typer
from rich.filesize import decimal

from serve_app.accounts.sealing.master_keys import MasterKeys
from serve_app.audit.act import Actor
from serve_app.backup.contents import query, read_contents
from serve_app.backup.create import Backups, session
from serve_app.backup.errors import BackupError
from serve_app.backup.folder import BackupFolder
from serve_app.backup.keyring import KeyRing, KeyRingFile
from serve_app.backup.manifest import Manifest
from serve_app.backup.programs import PostgresPrograms
from serve_app.backup.restore import Restore, Restored, check_target
from serve_app.backup.scheme import KeepScheme
from serve_app.backup.scratch import given_database, scratch_database
from serve_app.backup.trial import Drilled, Scratch, drill, verify_deep, verify_file
from serve_app.settings import BackupSettings, Settings
from serve_app.stack.accounts import MIGRATIONS, master_keys_of
from serve_app.stack.home import Home
from serve_app.stack.standalone import AccountsServer, accounts_server, programs_folder
from serve_app.subjects.erasing import reapply_erasures


@dataclass(frozen=True, slots=True)
class _Place:
    """What a command works with."""

    settings: Settings
    server: AccountsServer
    backups: Backups

    def scratch(self, name: str | None) -> Scratch:
        if name is not None:
            return given_database(self.server.postgres, name)
        return scratch_database(self.server.postgres, self.server.maker)

    def restore_of(self, manifest: Manifest, folder: BackupFolder, ring: KeyRing | None) -> Restore:
        return Restore(
            manifest=manifest,
            folder=folder,
            programs=self.backups.programs,
            ring=ring,
            migrations=MIGRATIONS,
            reapply=partial(reapply_erasures, masters=self._masters(ring)),
            actor=self.backups.actor,
        )

    def _masters(self, ring: KeyRing | None) -> MasterKeys:
        """Return the master keys, which must be there where something was erased."""
        if ring is None or not ring.rows.get("erasures"):
            return MasterKeys([])
        home = Home(self.settings.service.home_path)
        return master_keys_of(self.settings, home, os.environ)


async def create(settings: Settings, *, as_json: bool) -> None:
    """Make a backup, then remove those that the scheme does not keep."""
    async with _opened(settings) as place:
        manifest = await place.backups.create(place.server.postgres)
    removed = place.backups.prune(_scheme(settings.backup))
    if as_json:
        typer.echo(json.dumps({"backup": _to_json(manifest), "pruned": removed}))
        return
    typer.echo(_line(manifest))
    for name in removed:
        typer.echo(f"removed {name}, which the scheme does not keep")


async def check(
    settings: Settings, which: str | None, scratch: str | None, *, deep: bool, as_json: bool
) -> None:
    """Read a backup back; where `deep`, restore it into a scratch database and compare."""
    folder, manifest = _find(settings, which)
    if deep:
        async with _opened(settings) as place:
            programs = place.backups.programs
            await verify_deep(manifest, folder, programs, place.scratch(scratch))
    else:
        await verify_file(manifest, folder, PostgresPrograms(programs_folder(settings, os.environ)))
    if as_json:
        typer.echo(json.dumps({"whole": True, "deep": deep, "backup": _to_json(manifest)}))
        return
    typer.echo(f"{manifest.name} is whole")
    if deep:
        rows = sum(manifest.contents.rows.values())
        typer.echo(
            f"restored and compared: {rows} rows, the audit chain to row "
            f"{manifest.contents.audit.seq}"
        )


async def bring_back(
    settings: Settings, which: str, *, replaces: bool, without_keyring: bool, as_json: bool
) -> None:
    """Restore a backup into the database of the settings."""
    folder, manifest = _find(settings, which)
    async with _opened(settings) as place:
        async with session(place.server.postgres) as connection:
            await check_target(connection, replace=replaces)
            before = await _backup_before(place, connection) if replaces else None
        ring = None if without_keyring else _ring(settings, folder, manifest)
        restored = await place.restore_of(manifest, folder, ring).into(place.server.postgres)
    told = _told(manifest, restored) | {"backup_of_before": before}
    if as_json:
        typer.echo(json.dumps(told))
        return
    if before is not None:
        typer.echo(f"what was there before is kept as {before}")
    _say_restored(manifest, restored)


def show(settings: Settings, *, as_json: bool) -> None:
    """List the backups, newest first."""
    folder = _folder(settings)
    kept = {manifest.name: manifest for manifest in folder.manifests()}
    if as_json:
        listed = [
            {"name": name, "whole": name in kept, **(_to_json(kept[name]) if name in kept else {})}
            for name in folder.names()
        ]
        typer.echo(json.dumps(listed))
        return
    for name in folder.names():
        typer.echo(_line(kept[name]) if name in kept else f"{name}  damaged")


def prune(settings: Settings, *, dry_run: bool) -> None:
    """Remove what the scheme does not keep."""
    folder = _folder(settings)
    folder.prepare()
    backups = Backups(folder, PostgresPrograms(), Actor.operator())
    removed = backups.prune(_scheme(settings.backup), dry_run=dry_run)
    for name in removed:
        typer.echo(f"{'would remove' if dry_run else 'removed'} {name}")
    if not removed:
        typer.echo("the scheme keeps every backup")


async def write_keyring(settings: Settings) -> None:
    """Write the key ring anew, as after an erasure."""
    async with _opened(settings) as place:
        place.backups.folder.prepare()
        async with session(place.server.postgres) as connection:
            await read_contents(connection)  # says what to do where there is no schema
            ring = await KeyRingFile(place.backups.folder.path).rewrite(connection)
    typer.echo(f"wrote the key ring: {_rows(ring.rows)}")


async def rehearse(settings: Settings, scratch: str | None, *, breaks: bool, as_json: bool) -> None:
    """Back up, restore into a scratch database, verify, drop it; tell times and sizes."""
    folder = _folder(settings)
    async with _opened(settings) as place:

        def restore_of(manifest: Manifest) -> Restore:
            return place.restore_of(manifest, folder, _ring(settings, folder, manifest))

        done = await drill(
            place.backups,
            place.server.postgres,
            restore_of,
            place.scratch(scratch),
            breaks=breaks,
        )
    if as_json:
        times = {"create_s": round(done.create_s, 3), "restore_s": round(done.restore_s, 3)}
        told = _told(done.manifest, done.restored) | times | {"damage": done.damage}
        typer.echo(json.dumps(told))
        return
    _say_drilled(done)


@asynccontextmanager
async def _opened(settings: Settings) -> AsyncIterator[_Place]:
    async with accounts_server(settings, os.environ) as server:
        programs = PostgresPrograms(programs_folder(settings, os.environ))
        backups = Backups(_folder(settings), programs, Actor.operator())
        yield _Place(settings, server, backups)


def _folder(settings: Settings) -> BackupFolder:
    return BackupFolder(settings.backup.path_below(settings.service.home_path))


def _find(settings: Settings, which: str | None) -> tuple[BackupFolder, Manifest]:
    """Return the backup that was asked for, by name or by path; the newest where by neither."""
    folder = _folder(settings)
    if which is None:
        names = folder.names()
        if not names:
            raise BackupError(f"There is no backup in {folder.path}.")
        return folder, folder.read(names[0])
    path = Path(which)
    if path.name != which:
        folder = BackupFolder(path.expanduser().resolve().parent)
    return folder, folder.read(path.name.removesuffix(".dump").removesuffix(".json"))


def _ring(settings: Settings, folder: BackupFolder, manifest: Manifest) -> KeyRing:
    """Return the newest ring of the backup's installation, of its folder or of the settings'."""
    installation = manifest.contents.installation
    read = [KeyRingFile(path).read() for path in {folder.path, _folder(settings).path}]
    rings = [ring for ring in read if ring is not None and ring.installation == installation]
    if not rings:
        raise BackupError(
            f"There is no key ring of installation {installation} beside {manifest.name}. Without "
            "it no sealed text can be read, and what was erased since would come back. Put the "
            "file `keyring` there, or use --without-keyring."
        )
    return max(rings, key=lambda ring: ring.written_at)


async def _backup_before(place: _Place, connection: asyncpg.Connection) -> str | None:
    """Make a backup of what is to be replaced, if anything is; return its manifest's path."""
    if not await connection.fetchval(query("has_installation")):
        return None
    installation = await connection.fetchval(query("installation"))
    folder = place.backups.folder
    ring = KeyRingFile(folder.path).read()
    if ring is not None and ring.installation != installation:
        # A fresh installation in the place of a lost one: its keys must not replace those.
        folder = BackupFolder(folder.path / str(installation))
    backups = replace(place.backups, folder=folder)
    manifest = await backups.create(place.server.postgres)
    return str(folder.manifest(manifest.name))


def _scheme(settings: BackupSettings) -> KeepScheme:
    return KeepScheme(daily=settings.daily, weekly=settings.weekly, monthly=settings.monthly)


def _to_json(manifest: Manifest) -> dict[str, Any]:
    return manifest.model_dump(mode="json")


def _told(manifest: Manifest, restored: Restored) -> dict[str, Any]:
    return {"backup": manifest.name, "bytes": manifest.dump.bytes, **asdict(restored)}


def _line(manifest: Manifest) -> str:
    rows = sum(manifest.contents.rows.values())
    size = decimal(manifest.dump.bytes)
    return f"{manifest.name}  {size}  {rows} rows  schema {manifest.contents.migrations[-1]}"


def _say_restored(manifest: Manifest, restored: Restored) -> None:
    typer.echo(
        f"restored {manifest.name}: {sum(restored.rows.values())} rows, as its manifest says"
    )
    typer.echo(f"the audit chain is intact to row {restored.audit_rows}")
    for label in restored.migrated:
        typer.echo(f"applied {label}")
    if restored.keys:
        typer.echo(f"key ring: {_rows(restored.keys)}; erased again: {restored.erased_again}")
    else:
        typer.echo("no keys were brought back")


def _say_drilled(done: Drilled) -> None:
    typer.echo(_line(done.manifest))
    typer.echo(f"created and read back in {done.create_s:.1f} s")
    typer.echo(f"restored into a scratch database and verified in {done.restore_s:.1f} s")
    if done.damage is not None:
        typer.echo(f"broken: {'; '.join(done.damage)}; and restored over it")
    _say_restored(done.manifest, done.restored)


def _rows(counts: dict[str, int]) -> str:
    return ", ".join(f"{rows} {name}" for name, rows in counts.items()) or "no keys"
