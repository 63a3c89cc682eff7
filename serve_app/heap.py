"""Gives memory that is free back to the system."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable

from serve_app.background import stop_tasks

# What 1,500 requests leave lying takes some 4 MiB; a trim takes milliseconds.
_EVERY_S = 10.0


class HeapTrimmer:
    """Has the allocator give back what is free, again and again.

    glibc keeps what lies free between two blocks in use, in each of its arenas, of which a process
    with threads has many: a gateway whose blocks took 57 MiB all the time held 16 MiB besides
    after its start and 39 after 7,500 requests (load_tests/NOTES.md).

    Args:
        trim: called in a thread. Where the allocator has none, there is nothing to do.
    """

    def __init__(self, every_s: float = _EVERY_S, trim: Callable[[], object] | None = None) -> None:
        self._every_s = every_s
        self._trim = trim or _malloc_trim()
        self._trimming: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin."""
        if self._trim is not None:
            self._trimming = asyncio.create_task(self._again(self._trim), name="trim-heap")

    async def close(self) -> None:
        """Stop; a trim that runs ends by itself."""
        await stop_tasks(self._trimming)

    async def _again(self, trim: Callable[[], object]) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            await asyncio.to_thread(trim)


def _malloc_trim() -> Callable[[], object] | None:
    """Return a call of glibc's malloc_trim(3); None where the C library has none."""
    call = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return None if call is None else lambda: call(0)
