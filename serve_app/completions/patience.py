"""A bound on each of many short waits, with one timer for all of them."""

from __future__ import annotations

import asyncio
from types import TracebackType


class Patience:
    """Bounds how long each block may take: `with patience:`, one block at a time.

    `asyncio.timeout` sets a timer for each block and takes it down again, for a wait that is
    nearly always over at once. Here one timer looks now and then since when a block is open.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._since_s = 0.0
        self._task: asyncio.Task[object] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._overdue = False
        self._cancelling = 0

    def __enter__(self) -> None:
        self._task = task = asyncio.current_task()
        self._cancelling = 0 if task is None else task.cancelling()
        self._since_s = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(self._seconds, self._look)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        """Raise TimeoutError where the block was ended for its time."""
        task, self._task = self._task, None
        overdue, self._overdue = self._overdue, False
        if not overdue or task is None:
            return
        # Where others want the task to end too, it is theirs.
        alone = task.uncancel() <= self._cancelling
        if alone and kind is not None and issubclass(kind, asyncio.CancelledError):
            raise TimeoutError from error

    def close(self) -> None:
        """Take the timer down; the next block would set it again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if self._task is None:
            return
        left_s = self._since_s + self._seconds - self._loop.time()
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._look)
        else:
            self._overdue = True
            self._task.cancel()
