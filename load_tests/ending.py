"""Long runs end by themselves, and take with them what they started."""

from __future__ import annotations

import asyncio
import signal
import sys
from types import FrameType


def end_in_order(limit_s: float) -> None:
    """Have SIGTERM, and `limit_s` from now, end this process as `sys.exit` does.

    What is open is then closed: a stack is stopped, results are written. For the main thread. In
    an event loop the end comes between two steps of it: a step that raised `SystemExit` in a task
    would leave its traceback behind.
    """

    def end(number: int, _: FrameType | None) -> None:
        # Once: what is closed now is not to be interrupted.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(f"ended by {signal.Signals(number).name}", file=sys.stderr)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            sys.exit(128 + number)
        loop.call_soon_threadsafe(sys.exit, 128 + number)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
