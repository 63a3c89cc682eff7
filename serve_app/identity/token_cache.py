"""What was found out about tokens, by their SHA-256, so that no token stays in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from serve_app.identity.lru import Lru

Found = TypeVar("Found")


class TokenCache(Generic[Found]):
    """A bounded map with the age of its entries; `clock` is monotonic seconds."""

    def __init__(self, size: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._entries: Lru[bytes, tuple[Found, float]] = Lru(size)

    def get(self, digest: bytes, max_age_s: float) -> Found | None:
        """Return what was put at most `max_age_s` ago, or None; older entries stay."""
        entry = self._entries.get(digest)
        if entry is None or self._clock() - entry[1] >= max_age_s:
            return None
        return entry[0]

    def put(self, digest: bytes, found: Found) -> None:
        """Keep an entry."""
        self._entries.put(digest, (found, self._clock()))

    def pop(self, digest: bytes) -> None:
        """Drop an entry, if there is one."""
        self._entries.pop(digest)
