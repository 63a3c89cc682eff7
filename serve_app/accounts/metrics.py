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

    def spool_full(self, full: bool) -> None:
        """Whether there is no room for the records of new requests; told again and again."""
        ...

    def postgres_write_s(self, seconds: float) -> None:
        """How long one batch took to write."""
        ...

    def rows_written(self, rows: int) -> None:
        """Rows that this write added to PostgreSQL; never 0."""
        ...

    def bodies_not_redacted(self, rows: int) -> None:
        """Bodies that could not be redacted, and of which the shape alone is kept; never 0."""
        ...


class UpkeepMetrics(Protocol):
    """Where the upkeep's measurements go. `task` is one of a few names that the code gives."""

    def upkeep_succeeded(self, task: str, seconds: float) -> None:
        """`task` was done just now and took so long."""
        ...

    def upkeep_failed(self, task: str) -> None:
        """`task` failed."""
        ...

    def upkeep_goes_on(self) -> None:
        """Told every few seconds by the process that does the upkeep: what it said holds."""
        ...

    def upkeep_left(self) -> None:
        """This process does the upkeep no more: what it said is another's to say."""
        ...


class NoMetrics:
    """Metrics that go nowhere, for tools and tests."""

    def spool_depth(self, rows: int) -> None:
        """Ignore it."""

    def spool_lag_s(self, seconds: float) -> None:
        """Ignore it."""

    def spool_full(self, full: bool) -> None:
        """Ignore it."""

    def postgres_write_s(self, seconds: float) -> None:
        """Ignore it."""

    def rows_written(self, rows: int) -> None:
        """Ignore it."""

    def bodies_not_redacted(self, rows: int) -> None:
        """Ignore it."""

    def upkeep_succeeded(self, task: str, seconds: float) -> None:
        """Ignore it."""

    def upkeep_failed(self, task: str) -> None:
        """Ignore it."""

    def upkeep_goes_on(self) -> None:
        """Ignore it."""

    def upkeep_left(self) -> None:
        """Ignore it."""

    def partitions_ahead(self, months: int) -> None:
        """Ignore it."""
