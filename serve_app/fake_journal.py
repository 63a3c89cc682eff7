"""What a fake engine counted, on disk token by token: so that it outlives a SIGKILL.

A line goes to the kernel before its token goes out, and the kernel keeps it when the process
dies. One file for each engine, a line for each step: request id, prompt and completion tokens,
and the machine's monotonic clock, which all its processes share.
"""

from __future__ import annotations

import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Counted:
    """Of one request: tokens, prompt and completion, and when the last was counted."""

    tokens: int
    last_s: float


class CountJournal:
    """The file of one engine.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        name = f"{os.getpid()}-{secrets.token_hex(4)}.counts"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
        self._file = os.open(folder / name, flags, 0o600)

    def count(self, request_id: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Note tokens of one request; a repeat adds to it."""
        counts = f"{prompt_tokens} {completion_tokens} {time.monotonic():.3f}"
        os.write(self._file, f"{request_id} {counts}\n".encode())


def read_journals(folder: Path) -> dict[str, Counted]:
    """Return what the engines counted, by request id."""
    counted: dict[str, Counted] = {}
    for file in folder.glob("*.counts"):
        for line in file.read_text(encoding="ascii").splitlines():
            request_id, prompt_tokens, completion_tokens, at_s = line.split(" ")
            before = counted.get(request_id, Counted(0, 0.0))
            counted[request_id] = Counted(
                before.tokens + int(prompt_tokens) + int(completion_tokens),
                max(before.last_s, float(at_s)),
            )
    return counted
