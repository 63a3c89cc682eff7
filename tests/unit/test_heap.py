"""Memory that is free goes back to the system."""

from __future__ import annotations

import asyncio
import subprocess
import sys

from serve_app.heap import HeapTrimmer

# Blocks of glibc's own, of which every fiftieth stays, so that none lies at the end.
_FREED = """
import asyncio, psutil
from serve_app.heap import HeapTrimmer

def resident_bytes():
    return psutil.Process().memory_info().rss

async def main():
    blocks = [bytearray(2000) for _ in range(50_000)]
    full_bytes = resident_bytes()
    blocks = blocks[::50]
    freed_bytes = resident_bytes()
    trimmer = HeapTrimmer(every_s=0)
    trimmer.start()
    for _ in range(500):
        if resident_bytes() < full_bytes - 50_000_000:
            break
        await asyncio.sleep(0.01)
    await trimmer.close()
    print(full_bytes - freed_bytes, full_bytes - resident_bytes(), len(blocks))

asyncio.run(main())
"""


def test_what_lies_free_between_blocks_is_given_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FREED], capture_output=True, text=True, check=True
    )
    by_itself, trimmed, _ = map(int, done.stdout.split())
    assert by_itself < 10_000_000
    assert trimmed > 50_000_000


async def test_trims_until_it_is_closed() -> None:
    trims = asyncio.Semaphore(0)
    loop = asyncio.get_running_loop()
    trimmer = HeapTrimmer(every_s=0, trim=lambda: loop.call_soon_threadsafe(trims.release))
    trimmer.start()
    async with asyncio.timeout(10):
        await trims.acquire()
        await trims.acquire()
    await trimmer.close()
    names = {task.get_name() for task in asyncio.all_tasks()}
    assert "trim-heap" not in names


async def test_one_that_was_not_started_can_be_closed() -> None:
    await HeapTrimmer().close()
