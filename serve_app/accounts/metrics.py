"""What the log reports of itself."""

from __future__ import annotations

from typing import Protocol


class LogMetrics(Protocol):
    """Where the log's measurements go; `deployments` joins it to Ray's metrics."""

    def spool_depth(self, rows: int) -> None:
        """Rows that wait in the spool now."""
        ...

    def spool_lag_s(self, seconds: float) -> None:
        """How long the oldest of them has waited."""
        ...

    def postgres_write_s(self, seconds: float) -> None:
        """How long one batch took to write."""
        ...

    def rows_written(self, rows: int) -> None:
        """Rows that this write added to PostgreSQL; never 0."""
        ...


class NoMetrics:
    """Metrics that go nowhere, for tools and tests."""

    def spool_depth(self, rows: int) -> None:
        """Ignore it."""

    def spool_lag_s(self, seconds: float) -> None:
        """Ignore it."""

    def postgres_write_s(self, seconds: float) -> None:
        """Ignore it."""

    def rows_written(self, rows: int) -> None:
        """Ignore it."""
