"""Tells an engine that is stuck from one that is busy."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable


class EngineStuck(RuntimeError):
    """The engine has requests and does nothing."""


class EngineWatch:
    """Watches an engine's progress, one look at a time.

    Args:
        stuck_after_s: how long an engine with requests may stand still.
        clock: seconds that only grow.
    """

    def __init__(self, stuck_after_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._stuck_after_s = stuck_after_s
        self._clock = clock
        self._progress: Hashable = None
        self._standing_since_s: float | None = None

    def look(self, unfinished: int, progress: Hashable) -> None:
        """Note what is seen now.

        Args:
            unfinished: requests that the engine was given and has not finished.
            progress: anything that changes with every step of the engine.

        Raises:
            EngineStuck: there have been requests and no progress for too long.
        """
        now_s = self._clock()
        moved = progress != self._progress
        self._progress = progress
        if unfinished == 0:
            self._standing_since_s = None
        elif moved or self._standing_since_s is None:
            # An idle engine stands still by right: time counts from the first look at work.
            self._standing_since_s = now_s
        elif now_s - self._standing_since_s >= self._stuck_after_s:
            raise EngineStuck(
                f"{unfinished} requests and no step for {now_s - self._standing_since_s:.0f} s"
            )
