"""What a request waits for, and what it is told of its place."""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.config import ModelEntry, QueueConfig
from serve_app.contracts import LeaseHint

# How many waited for the same model at the same gateway, and were to be served first, when
# the request came.
POSITION_HEADER = "x-comp-ai-queue-position"


@dataclass(slots=True, kw_only=True)
class Ticket:
    """One request in the queue. `ahead` is set when it comes there, refused or not.

    One that has just met a lease or a replica that is gone is to get a `fresh` lease, which Ray
    grants now.
    """

    model: ModelEntry
    hint: LeaseHint
    queue: QueueConfig
    timeout_s: float
    fresh: bool = False
    ahead: int | None = None

    def headers(self) -> dict[str, str]:
        """Return what the answer says of the queue."""
        return {} if self.ahead is None else {POSITION_HEADER: str(self.ahead)}
