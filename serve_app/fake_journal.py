"""What a fake engine counted, on disk token by token: so that it outlives a SIGKILL.

A line goes to the kernel before its token goes out, and the kernel keeps it when the process
dies. One file for each engine, a line for each step: request id, prompt and completion tokens.
"""

from __future__ import annotations

import os
import secrets
from collections import defaultdict
from pathlib import Path


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
        os.write(self._file, f"{request_id} {prompt_tokens} {completion_tokens}\n".encode())


def read_journals(folder: Path) -> dict[str, int]:
    """Return the tokens that the engines counted, prompt and completion, by request id."""
    counted: dict[str, int] = defaultdict(int)
    for file in folder.glob("*.counts"):
        for line in file.read_text(encoding="ascii").splitlines():
            request_id, prompt_tokens, completion_tokens = line.split(" ")
            counted[request_id] += int(prompt_tokens) + int(completion_tokens)
    return dict(counted)
