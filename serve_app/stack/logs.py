"""Copy the replicas' log lines to our own stdout, where a container's log agent reads.

They write JSON to their stdout, which Ray puts into one file for each worker.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import orjson

_INTERVAL_S = 0.3
_FILES = "worker-*.out"
_HINT = b'"action"'
_MAX_PENDING_BYTES = 1024 * 1024


class LogFollower:
    """Reads what is new in the workers' files and hands on ours."""

    def __init__(self, folder: Path, write: Callable[[str], None]) -> None:
        self._folder = folder
        self._write = write
        self._read: dict[Path, int] = {}
        self._pending: dict[Path, bytes] = {}

    def skip_present(self) -> None:
        """Leave out what is there now: a head that is started again goes on with its session."""
        for path in self._folder.glob(_FILES):
            with suppress(OSError):
                self._read[path] = path.stat().st_size

    async def run(self) -> None:
        """Follow until cancelled; what was written until then is copied before the end."""
        try:
            while True:
                self.copy_new()
                await asyncio.sleep(_INTERVAL_S)
        finally:
            self.copy_new()

    def copy_new(self) -> None:
        """Copy the lines that were completed since the last call."""
        for path in self._folder.glob(_FILES):
            with suppress(OSError):
                self._copy_from(path)

    def _copy_from(self, path: Path) -> None:
        start = self._read.get(path, 0)
        size = path.stat().st_size
        if size == start:
            return
        if size < start:  # rotated or truncated
            start = 0
            self._pending.pop(path, None)
        with path.open("rb") as file:
            file.seek(start)
            data = file.read()
        self._read[path] = start + len(data)
        *lines, rest = (self._pending.get(path, b"") + data).split(b"\n")
        # An endless line is none of ours.
        self._pending[path] = rest if len(rest) < _MAX_PENDING_BYTES else b""
        for line in lines:
            if is_log_line(line):
                self._write(line.decode("utf-8", "replace"))


def is_log_line(line: bytes) -> bool:
    """Tell whether a line is ours: a JSON object with an `action`."""
    if not line.startswith(b"{") or _HINT not in line:
        return False
    try:
        return isinstance(orjson.loads(line).get("action"), str)
    except orjson.JSONDecodeError:
        return False


def write_line(line: str) -> None:
    """Write to our stdout at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
