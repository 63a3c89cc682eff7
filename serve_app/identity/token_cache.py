"""What was found out about tokens, by their SHA-256, so that no token stays in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Found = TypeVar("Found")


class TokenCache(Generic[Found]):
    """A bounded map with the age of its entries; the least used one makes room.

    `clock` is monotonic seconds.
    """

    def __init__(self, size: int, clock: Callable[[], float]) -> None:
        self._size = size
        self._clock = clock
        self._entries: OrderedDict[bytes, tuple[Found, float]] = OrderedDict()

    def get(self, digest: bytes, max_age_s: float) -> Found | None:
        """Return what was put at most `max_age_s` ago, or None; older entries stay."""
        entry = self._entries.get(digest)
        if entry is None or self._clock() - entry[1] >= max_age_s:
            return None
        self._entries.move_to_end(digest)
        return entry[0]

    def put(self, digest: bytes, found: Found) -> None:
        """Keep an entry."""
        self._entries[digest] = (found, self._clock())
        self._entries.move_to_end(digest)
        if len(self._entries) > self._size:
            self._entries.popitem(last=False)

    def pop(self, digest: bytes) -> None:
        """Drop an entry, if there is one."""
        self._entries.pop(digest, None)
