"""Whose turn it is: owners take turns, and so do the batches of one owner.

After a refusal a batch pauses, and goes on with one line at a time; each answer then adds one.
So a batch that meets a limit does not fill the accounts with refusals.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from serve_app.batches.batch import OpenBatch


class _Place:
    """A batch and its pace."""

    def __init__(self, batch: OpenBatch, most: int) -> None:
        self.batch = batch
        self.width = most
        self.running = 0
        self.paused_until = 0.0
        self.dry = False

    def ready(self, now: float) -> bool:
        """Tell whether a line more may be run."""
        return not self.dry and self.running < self.width and now >= self.paused_until


class Rotation:
    """The batches in progress that this gateway knows of.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._owners: OrderedDict[str, OrderedDict[str, _Place]] = OrderedDict()
        self._places: dict[str, _Place] = {}
        self._most = 1

    def __len__(self) -> int:
        return len(self._places)

    def refresh(self, batches: Sequence[OpenBatch], most: int) -> None:
        """Take over which batches there are; each may have `most` lines running here."""
        self._most = most
        ids = {batch.id for batch in batches}
        for place in [p for p in self._places.values() if p.batch.id not in ids]:
            self._forget(place.batch)
        for batch in batches:
            place = self._places.setdefault(batch.id, _Place(batch, most))
            place.dry = False
            place.width = min(place.width, most)
            self._owners.setdefault(batch.owner, OrderedDict())[batch.id] = place

    def next(self) -> OpenBatch | None:
        """Return the batch whose turn it is, and put it and its owner at the end."""
        now = self._clock()
        for owner, places in self._owners.items():
            for batch_id, place in places.items():
                if place.ready(now):
                    places.move_to_end(batch_id)
                    self._owners.move_to_end(owner)
                    return place.batch
        return None

    def dry(self, batch_id: str) -> None:
        """Note that the batch has no line to take, until the next refresh."""
        if (place := self._places.get(batch_id)) is not None:
            place.dry = True

    def started(self, batch_id: str) -> None:
        """Note that a line of the batch runs."""
        if (place := self._places.get(batch_id)) is not None:
            place.running += 1

    def ended(self, batch_id: str, *, pause_s: float | None) -> None:
        """Note that a line ended; `pause_s` where it was refused for now."""
        place = self._places.get(batch_id)
        if place is None:
            return
        place.running = max(0, place.running - 1)
        if pause_s is None:
            place.width = min(place.width + 1, self._most)
        else:
            place.width = 1
            place.paused_until = max(place.paused_until, self._clock() + pause_s)

    def _forget(self, batch: OpenBatch) -> None:
        del self._places[batch.id]
        places = self._owners[batch.owner]
        del places[batch.id]
        if not places:
            del self._owners[batch.owner]
