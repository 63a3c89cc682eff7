"""Files that must survive a power cut."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_whole(path: Path, data: bytes, *, mode: int = 0o600, overwrite: bool = True) -> None:
    """Write a file that is there whole or not at all, durably.

    Args:
        path: the file; its folder must be there.
        data: all of it.
        mode: its permissions, less the process's umask.
        overwrite: replace a file that is there.

    Raises:
        FileExistsError: it is there, and is not to be replaced.
        OSError: it cannot be written.
    """
    # One name, so that the next run clears away what a killed one left. Several may make a
    # file that none of them replaces, and must not write into each other's draft.
    draft = path.with_name(f"{path.name}{'' if overwrite else f'.{secrets.token_hex(8)}'}.partial")
    draft.unlink(missing_ok=True)
    try:
        _write_new(draft, data, mode)
        if overwrite:
            draft.rename(path)
        else:
            # A link fails where a rename would replace what another process made meanwhile.
            path.hardlink_to(draft)
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(path.parent)


def _write_new(path: Path, data: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: fsync of a file alone does not cover its name.

    Raises:
        OSError: the folder cannot be opened or synced.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
