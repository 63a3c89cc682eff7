"""The folder of the backups.

    <folder>/comp-ai-20261128T041000.123Z.dump    what pg_dump wrote, in its custom format
    <folder>/comp-ai-20261128T041000.123Z.json    its manifest; without one it is no backup
    <folder>/keyring                              the keys of the subjects, newest generation only
    <folder>/*.partial                            of a backup that is being made, or was broken off

All of it is closed to other users.
"""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from serve_app.backup.errors import BackupDamaged, BackupError
from serve_app.backup.manifest import Manifest
from serve_app.errors import ConfigError
from serve_app.files import sync_folder, write_whole

_CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class BackupFolder:
    """Names and files of one folder."""

    path: Path

    def prepare(self) -> None:
        """Make the folder, closed to other users.

        Raises:
            ConfigError: it cannot be made or is not ours.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path.chmod(0o700)
        except OSError as error:
            allowed = f"a folder that we may write ({error.strerror})"
            raise ConfigError("COMP_AI_BACKUP_PATH", str(self.path), allowed) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder: one backup is made, or pruned, at a time.

        Raises:
            BackupError: another process holds it.
        """
        with (self.path / ".lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BackupError(f"Another backup is being made in {self.path}.") from None
            yield

    def dump(self, name: str) -> Path:
        """Return the file of the dump."""
        return self.path / f"{name}.dump"

    def manifest(self, name: str) -> Path:
        """Return the file of the manifest."""
        return self.path / f"{name}.json"

    def partial(self, name: str) -> Path:
        """Return the file that a dump is written to at first."""
        return self.path / f"{name}.dump.partial"

    def read(self, name: str) -> Manifest:
        """Return the manifest of one backup.

        Raises:
            BackupError: there is none of that name.
            BackupDamaged: the manifest is damaged.
        """
        try:
            data = self.manifest(name).read_bytes()
        except FileNotFoundError:
            raise BackupError(
                f"There is no backup {name} in {self.path}: its manifest is missing."
            ) from None
        return Manifest.from_json(data, name)

    def names(self) -> list[str]:
        """Return the names of all backups, newest first, damaged ones too."""
        return sorted((file.stem for file in self.path.glob("comp-ai-*.json")), reverse=True)

    def manifests(self) -> Iterator[Manifest]:
        """Yield the manifests that can be read and have a dump of the right size, newest first."""
        for name in self.names():
            try:
                manifest = self.read(name)
                if self.dump(name).stat().st_size == manifest.dump.bytes:
                    yield manifest
            except (BackupError, FileNotFoundError):
                continue  # `verify` and `list` say what is wrong with it

    def check(self, manifest: Manifest) -> None:
        """Read the whole dump and compare it with its manifest.

        Raises:
            BackupDamaged: it is missing, or has another length or content.
        """
        dump = self.dump(manifest.name)
        try:
            found_bytes, found_sha256 = measure(dump)
        except FileNotFoundError:
            raise BackupDamaged(f"The dump of {manifest.name} is missing.") from None
        if found_bytes != manifest.dump.bytes:
            raise BackupDamaged(
                f"{dump.name} has {found_bytes} bytes; its manifest says {manifest.dump.bytes}."
            )
        if found_sha256 != manifest.dump.sha256:
            raise BackupDamaged(f"{dump.name} was changed: its SHA-256 is not the manifest's.")

    def finish(self, manifest: Manifest) -> None:
        """Give the partial dump its name, and write its manifest: from here on it is a backup."""
        self.partial(manifest.name).rename(self.dump(manifest.name))
        write_whole(self.manifest(manifest.name), manifest.to_json())

    def remove(self, name: str) -> None:
        """Remove one backup: the manifest first, so that no half of it is taken for a whole."""
        self.manifest(name).unlink(missing_ok=True)
        sync_folder(self.path)
        self.dump(name).unlink(missing_ok=True)

    def remove_leftovers(self) -> list[str]:
        """Remove what broken-off backups left; call it while the folder is held."""
        found = list(self.path.glob("comp-ai-*.partial"))
        found += [
            dump
            for dump in self.path.glob("comp-ai-*.dump")
            if not self.manifest(dump.stem).exists()
        ]
        for file in found:
            file.unlink()
        return sorted(file.name for file in found)


def measure(file: Path) -> tuple[int, str]:
    """Return length in bytes and SHA-256, in hexadecimal, of a file."""
    digest, length = hashlib.sha256(), 0
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK_BYTES):
            digest.update(chunk)
            length += len(chunk)
    return length, digest.hexdigest()
