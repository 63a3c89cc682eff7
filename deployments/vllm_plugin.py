"""A vLLM plugin: its engine processes must not outlive the replica that started them.

vLLM loads `vllm.general_plugins` in each of its processes. A replica that is killed takes
none of them along, and an engine left behind would go on holding its GPU memory, so that the
replica that Serve starts instead finds no room.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def register() -> None:
    """Ask the kernel to kill this process with its parent, if it is a child of vLLM's."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent.pid:
        # The parent died before the kernel was asked.
        os.kill(os.getpid(), signal.SIGKILL)
