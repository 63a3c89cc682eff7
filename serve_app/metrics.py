"""What the gateway tells the metrics of a request: once, when it has ended."""

from __future__ import annotations

from typing import Protocol

from serve_app.records import RequestRecord


class GatewayMetrics(Protocol):
    """Receives every finished request."""

    def request_finished(self, record: RequestRecord, model_label: str) -> None:
        """Count `record`; `model_label` is a configured name, so its values are bounded."""
        ...

    def request_retried(self, model_label: str) -> None:
        """Count a request that is asked again because its replica failed."""
        ...


class NoMetrics:
    """Counts nothing."""

    def request_finished(self, record: RequestRecord, model_label: str) -> None:
        """Do nothing."""

    def request_retried(self, model_label: str) -> None:
        """Do nothing."""
