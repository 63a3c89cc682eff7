"""Trouble that is no death: a link that breaks, a disk that is full, a clock that is moved."""

from __future__ import annotations

import errno
import os
import random
import subprocess
from pathlib import Path
from typing import Protocol

from tests.integration.links import Link

_CHUNK = bytes(256 * 1024)
_CLOCK_STEPS_S = (-86400, -3600, -5, 5, 3600, 86400)


class Fault(Protocol):
    """Something that is broken and mended again."""

    name: str

    async def strike(self, rng: random.Random) -> None:
        """Break it."""
        ...

    async def heal(self) -> None:
        """Mend it."""
        ...


class CutLink:
    """Every connection to PostgreSQL is reset, also in the middle of a write."""

    name = "link cut"

    def __init__(self, link: Link) -> None:
        self._link = link

    async def strike(self, rng: random.Random) -> None:
        """See `Fault.strike`."""
        await self._link.cut()

    async def heal(self) -> None:
        """See `Fault.heal`."""
        await self._link.mend()


class SilentLink:
    """Connections stay open and pass nothing on; in the end they are lost."""

    name = "link silent"

    def __init__(self, link: Link) -> None:
        self._link = link

    async def strike(self, rng: random.Random) -> None:
        """See `Fault.strike`."""
        self._link.silence()

    async def heal(self) -> None:
        """See `Fault.heal`."""
        await self._link.cut()
        await self._link.mend()


class FullDisk:
    """Something else fills the disk of the spool. Its folder is a small disk of its own."""

    name = "disk full"

    def __init__(self, folder: Path) -> None:
        self._filler = folder / "filler"

    async def strike(self, rng: random.Random) -> None:
        """See `Fault.strike`."""
        with self._filler.open("wb", buffering=0) as filler:
            try:
                while filler.write(_CHUNK) == len(_CHUNK):
                    pass
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise

    async def heal(self) -> None:
        """See `Fault.heal`."""
        self._filler.unlink()


class MovedClock:
    """The clock of the processes that have its environment jumps, and jumps back."""

    name = "clock moved"

    def __init__(self, library: Path, folder: Path) -> None:
        self._library = library
        self._file = folder / "clock"
        self._write(0)

    @property
    def environment(self) -> dict[str, str]:
        """What the stack's processes need in their environment."""
        return {
            "LD_PRELOAD": str(self._library),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            # Else it reads the file by its own clock, and not for long after a step back.
            "FAKETIME_NO_CACHE": "1",
            # A moved clock leaves these alone, as on a real machine.
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",
        }

    async def strike(self, rng: random.Random) -> None:
        """See `Fault.strike`."""
        self._write(rng.choice(_CLOCK_STEPS_S))

    async def heal(self) -> None:
        """See `Fault.heal`."""
        self._write(0)

    def _write(self, seconds: int) -> None:
        fresh = self._file.with_suffix(".new")
        fresh.write_text(f"{seconds:+d}\n")
        fresh.rename(self._file)


def mount_small_disk(folder: Path, size_bytes: int) -> bool:
    """Make `folder` a disk of its own in memory; False where we may not."""
    folder.mkdir(mode=0o700, exist_ok=True)
    if os.geteuid() != 0:
        return False
    options = f"size={size_bytes},mode=700"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "comp-ai-spool", str(folder)], check=False
    )
    return done.returncode == 0


def unmount(folder: Path) -> None:
    """Take the disk away again, even where a process still holds it."""
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
