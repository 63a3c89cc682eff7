"""What the gateway tells the metrics of a request: once, when it has ended."""

from __future__ import annotations

from typing import Protocol

from serve_app.identity.sign_ins import CredentialKind, SignInMetrics
from serve_app.records import Outcome, RequestRecord


class GatewayMetrics(SignInMetrics, Protocol):
    """Receives every finished request, and every sign-in that failed."""

    def request_finished(self, record: RequestRecord, model_label: str) -> None:
        """Count `record`; `model_label` is a configured name, so its values are bounded."""
        ...

    def request_retried(self, model_label: str) -> None:
        """Count a request that is asked again because its replica failed."""
        ...

    def record_dropped(self, outcome: Outcome) -> None:
        """Count a request that ended so and that the log will not have."""
        ...

    def requests_waiting(self, app: str, requests: int) -> None:
        """Take note of how many wait for the replicas of `app`; told every few seconds."""
        ...


class NoMetrics:
    """Counts nothing."""

    def sign_in_failed(self, kind: CredentialKind, *, limited: bool) -> None:
        """Do nothing."""

    def requests_waiting(self, app: str, requests: int) -> None:
        """Do nothing."""

    def record_dropped(self, outcome: Outcome) -> None:
        """Do nothing."""

    def request_finished(self, record: RequestRecord, model_label: str) -> None:
        """Do nothing."""

    def request_retried(self, model_label: str) -> None:
        """Do nothing."""
