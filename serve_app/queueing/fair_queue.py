"""Who is served next of those who wait, and who gives way when there is no room.

Order: the lower priority number first, always. Within one priority it is start-time fair
queueing over principals (Goyal, Vin, Cheng: Start-Time Fair Queueing, SIGCOMM 1996): each
principal waits in a line of its own, first in, first out; the head of each line has a start
tag; the lowest tag is served, and the line's next head starts 1/weight later. A line that was
empty starts at the tag that was served last, so waiting for nothing saves up nothing.

Room: when all places are taken, a newcomer pushes out the newest of the longest line, lengths
counted by weight, if its own line would still be the shorter one (the buffer stealing of
McKenney: Stochastic Fairness Queueing, INFOCOM 1990). A more urgent newcomer pushes out one of
the least urgent. Otherwise the newcomer is refused.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from serve_app.config import Standing
from serve_app.queueing.ranked import Ranked

Item = TypeVar("Item")


class QueueFull(Exception):
    """Every place is taken, and nobody has to give way to the newcomer."""


@dataclass(eq=False, slots=True)
class Entry(Generic[Item]):
    """One who waits. `ahead` is how many were to be served before it when it came."""

    item: Item
    principal_id: str
    priority: int
    number: int
    ahead: int = 0
    displaced: Entry[Item] | None = None


class _Line(Generic[Item]):
    """What one principal waits for at one priority; `start` is the tag of its head."""

    def __init__(self, start: float) -> None:
        self.entries: OrderedDict[Entry[Item], None] = OrderedDict()
        self.start = start
        self.weight = 1.0

    @property
    def load(self) -> float:
        return len(self.entries) / self.weight

    @property
    def end(self) -> float:
        """The tag of the next entry."""
        return self.start + self.load

    def served_by(self, tag: float) -> int:
        """Return how many of these have a tag of `tag` or less."""
        if self.start > tag:
            return 0
        return min(len(self.entries), math.floor((tag - self.start) * self.weight) + 1)


class _Level(Generic[Item]):
    """The lines at one priority. It is forgotten, tags and all, when nobody waits in it."""

    def __init__(self) -> None:
        self.lines: dict[str, _Line[Item]] = {}
        self._now = 0.0
        self._by_start: Ranked[str] = Ranked()
        self._by_load: Ranked[str] = Ranked()
        # Principals that were served ahead of the present tag and now wait for nothing: they
        # begin again at their tag, or else one that asks singly would be served twice.
        self._resting: dict[str, float] = {}
        self._rest_over: Ranked[str] = Ranked()

    def next_tag(self, principal_id: str) -> float:
        line = self.lines.get(principal_id)
        if line is not None:
            return line.end
        return max(self._now, self._resting.get(principal_id, self._now))

    def ahead_of(self, principal_id: str) -> int:
        tag = self.next_tag(principal_id)
        return sum(line.served_by(tag) for line in self.lines.values())

    def add(self, entry: Entry[Item], weight: float) -> None:
        principal_id = entry.principal_id
        line = self.lines.get(principal_id)
        if line is None:
            line = self.lines[principal_id] = _Line(self.next_tag(principal_id))
            self._resting.pop(principal_id, None)
        line.weight = weight
        line.entries[entry] = None
        self._rank(principal_id, line)

    def first(self) -> Entry[Item]:
        first = self._by_start.first()
        assert first is not None
        return next(iter(self.lines[first[1]].entries))

    def take_first(self) -> Entry[Item]:
        entry = self.first()
        line = self.lines[entry.principal_id]
        del line.entries[entry]
        self._now = line.start
        line.start += 1 / line.weight
        self._after(entry.principal_id, line)
        self._forget_rested()
        return entry

    def take_out(self, entry: Entry[Item]) -> None:
        line = self.lines[entry.principal_id]
        del line.entries[entry]
        self._after(entry.principal_id, line)

    def gives_way(self, principal_id: str | None, weight: float) -> Entry[Item] | None:
        """Return who gives way to a newcomer; None stands for one from outside this level."""
        longest = self._by_load.first()
        assert longest is not None
        line = self.lines[longest[1]]
        if principal_id == longest[1]:
            return None
        if principal_id is not None:
            own = self.lines.get(principal_id)
            if ((len(own.entries) if own else 0) + 1) / weight >= line.load:
                return None
        return next(reversed(line.entries))

    def _after(self, principal_id: str, line: _Line[Item]) -> None:
        if line.entries:
            self._rank(principal_id, line)
            return
        del self.lines[principal_id]
        self._by_start.discard(principal_id)
        self._by_load.discard(principal_id)
        if line.start > self._now:
            self._resting[principal_id] = line.start
            self._rest_over.put(principal_id, (line.start, 0))

    def _rank(self, principal_id: str, line: _Line[Item]) -> None:
        head = next(iter(line.entries))
        self._by_start.put(principal_id, (line.start, head.number))
        self._by_load.put(principal_id, (-line.load, -head.number))

    def _forget_rested(self) -> None:
        while (first := self._rest_over.first()) is not None and first[0][0] <= self._now:
            self._rest_over.discard(first[1])
            self._resting.pop(first[1], None)


class FairQueue(Generic[Item]):
    """Entries in the order in which they are to be served; see the module for the rules.

    `push`, `pop` and `remove` are O(log n); counting who is ahead is O(principals waiting).
    Each entry leaves once: popped, removed, or displaced.
    """

    def __init__(self) -> None:
        self._levels: dict[int, _Level[Item]] = {}
        self._priorities: list[int] = []
        self._waiting: OrderedDict[Entry[Item], None] = OrderedDict()
        self._number = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Entry[Item]]:
        """Yield what waits, in the order in which it came."""
        return iter(self._waiting)

    def first(self) -> Entry[Item] | None:
        """Return the one that is to be served now; it goes on waiting."""
        return self._levels[self._priorities[0]].first() if self._priorities else None

    def push(self, item: Item, principal_id: str, standing: Standing, places: int) -> Entry[Item]:
        """Let `item` wait; `displaced` of its entry is the one that had to give way to it.

        Raises:
            QueueFull: all `places` are taken, and nobody gives way.
        """
        displaced = None
        if len(self) >= places:
            displaced = self._gives_way(principal_id, standing)
            self.remove(displaced)
        self._number += 1
        ahead = self.ahead_of(principal_id, standing)
        entry = Entry(item, principal_id, standing.priority, self._number, ahead, displaced)
        self._level(standing.priority).add(entry, standing.weight)
        self._waiting[entry] = None
        return entry

    def pop(self) -> Entry[Item] | None:
        """Take out the one that is to be served now; None where nobody waits."""
        if not self._priorities:
            return None
        entry = self._levels[self._priorities[0]].take_first()
        self._left(entry)
        return entry

    def remove(self, entry: Entry[Item]) -> bool:
        """Take `entry` out; False where it does not wait any more."""
        if entry not in self._waiting:
            return False
        self._levels[entry.priority].take_out(entry)
        self._left(entry)
        return True

    def ahead_of(self, principal_id: str, standing: Standing) -> int:
        """Return how many are to be served before one that would come now."""
        ahead = 0
        for priority in self._priorities:
            level = self._levels[priority]
            if priority < standing.priority:
                ahead += sum(len(line.entries) for line in level.lines.values())
            elif priority == standing.priority:
                ahead += level.ahead_of(principal_id)
        return ahead

    def _gives_way(self, principal_id: str, standing: Standing) -> Entry[Item]:
        least_urgent = self._priorities[-1] if self._priorities else standing.priority
        if standing.priority > least_urgent or not self._priorities:
            raise QueueFull
        same = standing.priority == least_urgent
        level = self._levels[least_urgent]
        found = level.gives_way(principal_id if same else None, standing.weight)
        if found is None:
            raise QueueFull
        return found

    def _level(self, priority: int) -> _Level[Item]:
        if priority not in self._levels:
            self._levels[priority] = _Level()
            insort(self._priorities, priority)
        return self._levels[priority]

    def _left(self, entry: Entry[Item]) -> None:
        del self._waiting[entry]
        if not self._levels[entry.priority].lines:
            del self._levels[entry.priority]
            self._priorities.remove(entry.priority)
