"""Tasks that are to run until they are stopped, and are checked for it."""

from __future__ import annotations

import asyncio
from typing import Any

from serve_app.errors import CompAIError


def check_goes_on(task: asyncio.Task[None], ended: str, broken: type[CompAIError]) -> None:
    """Say nothing while `task` runs.

    Raises:
        broken: it ended; says `ended`, and the class of what it ended of.
    """
    if task.done():
        cause = None if task.cancelled() else task.exception()
        name = type(cause).__name__ if cause else "cancelled"
        raise broken(f"{ended}: {name}.") from cause


async def stop_tasks(*tasks: asyncio.Task[Any] | None) -> None:
    """Cancel those of `tasks` that are there, and wait until each has ended, however it did."""
    begun = [task for task in tasks if task is not None]
    for task in begun:
        task.cancel()
    if begun:
        await asyncio.wait(begun)
