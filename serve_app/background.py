"""Tasks that are to run for ever, and are checked for it."""

from __future__ import annotations

import asyncio

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
