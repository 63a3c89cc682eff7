"""How much there was in the last 60 s."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

WINDOW_S = 60.0
# What comes within so short a time is one entry and leaves with its last part. So a window holds
# about a thousand entries at most, and something leaves it 60 ms late at most.
_RESOLUTION_S = 0.06


@dataclass(slots=True)
class _Entry:
    begun_s: float
    last_s: float
    amount: int


@dataclass(slots=True)
class SlidingWindow:
    """A sum over the last 60 s, never less than what it really was."""

    total: int = 0
    _entries: deque[_Entry] = field(default_factory=deque)

    def add(self, now: float, amount: int) -> None:
        """Count `amount` at `now`, which is never before what was counted already."""
        if amount == 0:
            return
        self.total += amount
        latest = self._entries[-1] if self._entries else None
        if latest is not None and now - latest.begun_s < _RESOLUTION_S:
            latest.last_s = now
            latest.amount += amount
        else:
            self._entries.append(_Entry(now, now, amount))

    def take_back(self, at_s: float, amount: int) -> None:
        """Count `amount` less of what was counted at `at_s`, unless that has left already."""
        for entry in reversed(self._entries):
            if entry.begun_s <= at_s <= entry.last_s:
                entry.amount -= amount
                self.total -= amount
                return

    def trim(self, now: float) -> None:
        """Let go what is older than 60 s."""
        while self._entries and now - self._entries[0].last_s >= WINDOW_S:
            self.total -= self._entries.popleft().amount

    def empty_in_s(self, now: float) -> float:
        """Return in how many seconds nothing of it is left."""
        return self._entries[-1].last_s + WINDOW_S - now if self._entries else 0.0

    def freed_in_s(self, now: float, amount: int) -> float | None:
        """Return in how many seconds `amount` of it has left; None if it holds less."""
        freed = 0
        for entry in self._entries:
            freed += entry.amount
            if freed >= amount:
                return max(0.0, entry.last_s + WINDOW_S - now)
        return None
