"""Where the spools of one machine lie: each in a folder of its own below one root.

A process takes a spool that nobody holds, and looks after those whose holder died. The lock
of a spool decides who has it, and the kernel gives the lock of a dead process back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from serve_app.accounts.spool import Spool
from serve_app.errors import ConfigError, LogUnavailable
from serve_app.files import sync_folder
from serve_app.group_commit import FileDamaged, FileHeld

_logger = logging.getLogger(__name__)

_MOST_SPOOLS = 1000
# A spool that could not be read is looked at again after this time.
_FAILED_PAUSE_S = 60.0

# Sizes and times of the files of a spool: as long as they stay, nothing was put into it.
_Print = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class _Seen:
    """A spool as it was let go, and until when it need not be looked at unless it changes."""

    files: _Print
    until_s: float


class SpoolFolders:
    """The spools below `root`; one that lies in `root` itself, as once, is emptied too.

    Args:
        root: the folder; made where it is not there.
        make: returns the spool of a folder, not open, that does not wait for its lock.
    """

    def __init__(self, root: Path, make: Callable[[Path], Spool]) -> None:
        self._root = root
        self._make = make
        self._seen: dict[Path, _Seen] = {}

    async def take(self) -> Spool:
        """Open the first spool that nobody holds, or a new one; the caller closes it.

        Raises:
            ConfigError: the root cannot be written, or every spool is held.
        """
        self._make_root()
        for number in range(_MOST_SPOOLS):
            spool = self._make(self._root / str(number))
            try:
                await spool.open()
            except FileHeld:
                continue
            except FileDamaged as error:
                _note_failure(spool.folder, error)
                continue
            sync_folder(self._root)
            return spool
        allowed = f"a folder with fewer than {_MOST_SPOOLS} spools that are held"
        raise ConfigError("the spool folder", str(self._root), allowed)

    async def abandoned(self) -> AsyncIterator[Spool]:
        """Open the spools that have rows and that nobody holds; the caller lets them go."""
        for folder in self._changed():
            if (spool := await self._open_with_rows(folder)) is not None:
                yield spool

    async def let_go(self, spool: Spool, *, failed: bool = False) -> None:
        """Close a spool that `abandoned` opened; one that failed is left alone for a while."""
        await spool.close()
        until_s = time.monotonic() + _FAILED_PAUSE_S if failed else math.inf
        self._seen[spool.folder] = _Seen(_print(spool.folder), until_s)

    def _make_root(self) -> None:
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            allowed = f"a folder that can be made ({type(error).__name__})"
            raise ConfigError("the spool folder", str(self._root), allowed) from error

    def _changed(self) -> list[Path]:
        """Return the folders of spools, but those that stand as they were let go."""
        now = time.monotonic()
        changed = []
        for folder in spool_folders(self._root):
            seen = self._seen.get(folder)
            if seen is None or now >= seen.until_s or seen.files != _print(folder):
                changed.append(folder)
        return changed

    async def _open_with_rows(self, folder: Path) -> Spool | None:
        spool = self._make(folder)
        failed = False
        try:
            await spool.open()
            if await spool.depth():
                return spool
        except FileHeld:
            return None
        except (ConfigError, LogUnavailable) as error:
            _note_failure(folder, error)
            failed = True
        except asyncio.CancelledError:
            await spool.close()
            raise
        await self.let_go(spool, failed=failed)
        return None


def spool_folders(root: Path) -> Iterator[Path]:
    """Yield `root` and the folders below it that hold a spool, whatever their names."""
    # A root that is not there, or that cannot be read, holds none for us.
    with contextlib.suppress(OSError):
        for folder in (root, *sorted(root.iterdir())):
            if (folder / Spool.FILE).is_file():
                yield folder


def _print(folder: Path) -> _Print:
    found = []
    for name in (Spool.FILE, f"{Spool.FILE}-wal"):
        try:
            stat = (folder / name).stat()
        except OSError:
            found.append((0, 0))
        else:
            found.append((stat.st_size, stat.st_mtime_ns))
    return tuple(found)


def _note_failure(folder: Path, error: Exception) -> None:
    _logger.error(
        "the spool %s cannot be read; it stays as it is",
        folder,
        extra={"action": "spool.unreadable", "folder": str(folder), "error": type(error).__name__},
    )
