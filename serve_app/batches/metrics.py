"""What the runner of batches tells the metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class BatchMetrics(Protocol):
    """Receives what happens to batches at one gateway."""

    def line_ended(self, result: str) -> None:
        """Count a line that was run here: completed, failed, postponed or lost."""
        ...

    def batches_open(self, counts: Mapping[str, int]) -> None:
        """Take the number of batches that have not ended, of all gateways, by status."""
        ...


class NoBatchMetrics:
    """Counts nothing."""

    def line_ended(self, result: str) -> None:
        """Do nothing."""

    def batches_open(self, counts: Mapping[str, int]) -> None:
        """Do nothing."""
