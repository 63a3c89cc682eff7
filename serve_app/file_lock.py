"""Locks between the processes of one machine; the kernel gives back that of a dead one."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class FileLock:
    """A lock that one process holds at a time. Its file stays where it is.

    Args:
        path: the file; made with the first try.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def try_take(self) -> bool:
        """Take it unless another has it; tell whether it is ours. Raises OSError."""
        if self._descriptor is not None:
            return True
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return True

    def give_back(self) -> None:
        """Let go of it, where it is ours."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def held_elsewhere(self) -> bool:
        """Tell whether another has it; where there is no file, nobody does. Raises OSError."""
        if self._descriptor is not None:
            return False
        try:
            with self._path.open("rb") as file:
                # Shared, so that two who look do not take each other for a holder.
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False
        return False
