"""A heap whose items can be ranked anew and taken out."""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)
Rank = tuple[float, int]

_COMPACT_ABOVE = 64


class Ranked(Generic[Item]):
    """Items in the order of their ranks. Each operation is O(log n), amortised.

    What was ranked anew or taken out stays in the heap until it comes to the top, or until
    such leftovers are more than half of it.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[Rank, int, Item]] = []
        self._current: dict[Item, int] = {}
        self._version = 0

    def __len__(self) -> int:
        return len(self._current)

    def put(self, item: Item, rank: Rank) -> None:
        """Give `item` this rank, whatever it had."""
        self._version += 1
        self._current[item] = self._version
        heapq.heappush(self._heap, (rank, self._version, item))
        if len(self._heap) > max(_COMPACT_ABOVE, 2 * len(self._current)):
            self._heap = [node for node in self._heap if self._holds(node)]
            heapq.heapify(self._heap)

    def discard(self, item: Item) -> None:
        """Take `item` out, if it is in."""
        self._current.pop(item, None)

    def first(self) -> tuple[Rank, Item] | None:
        """Return the lowest rank and its item; the item stays in."""
        while self._heap and not self._holds(self._heap[0]):
            heapq.heappop(self._heap)
        if not self._heap:
            return None
        rank, _, item = self._heap[0]
        return rank, item

    def _holds(self, node: tuple[Rank, int, Item]) -> bool:
        return self._current.get(node[2]) == node[1]
