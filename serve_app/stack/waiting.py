"""Waiting for parts that start: until they are ready, fail, or somebody stops us."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol

from serve_app.errors import CompAIError

_POLL_INTERVAL_S = 0.2


class NotReady(CompAIError):
    """A part did not become ready in time."""


class Running(Protocol):
    """What runs in the foreground."""

    async def failed(self) -> CompAIError:
        """Return once a part died that cannot be started again."""
        ...

    def kill(self) -> None:
        """Kill everything at once."""
        ...


async def wait_until(
    what: str, ready: Callable[[], Awaitable[str | None]], timeout_s: float
) -> None:
    """Poll until `ready` has nothing to complain of.

    Raises:
        NotReady: it goes on complaining; holds the last complaint.
    """
    deadline = time.monotonic() + timeout_s
    while (complaint := await ready()) is not None:
        if time.monotonic() > deadline:
            raise NotReady(f"{what} is not ready after {timeout_s:g} s: {complaint}.")
        await asyncio.sleep(_POLL_INTERVAL_S)


async def unless(stop: asyncio.Event, running: Running, work: Coroutine[Any, Any, Any]) -> Any:
    """Return what `work` returns, or None if told to stop before.

    Raises:
        CompAIError: `work` failed, or a part that cannot be started again died.
    """
    tasks = {
        "work": asyncio.create_task(work),
        "stop": asyncio.create_task(stop.wait()),
        "died": asyncio.create_task(running.failed()),
    }
    try:
        await asyncio.wait(tasks.values(), return_when=asyncio.FIRST_COMPLETED)
        if tasks["stop"].done():
            return None
        if tasks["died"].done():
            raise await tasks["died"]
        return await tasks["work"]
    finally:
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)


def stop_on_signals(running: Running) -> asyncio.Event:
    """Return an event that the first signal sets; the second kills everything at once."""
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            running.kill()
            os._exit(130)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, on_signal)
    return stop
