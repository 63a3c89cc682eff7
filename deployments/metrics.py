"""The gateway's metrics, on Ray's metrics port. Ray puts `ray_` in front of each name.

Observed once a request, never a token: Ray's agent handles every observation in Python.
"""

from __future__ import annotations

from collections.abc import Mapping

from ray.serve.metrics import Counter, Gauge, Histogram

from serve_app.errors import (
    ModelNotReady,
    ModelOverloaded,
    OverLimit,
    QuotaExceeded,
    RateLimited,
)
from serve_app.identity.sign_ins import CredentialKind
from serve_app.records import Outcome, RequestRecord

_DURATIONS_S = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600]
_STEPS_S = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 30]
_LABELS = ("route", "model")
_LIMIT_REFUSALS = (RateLimited.code, QuotaExceeded.code, OverLimit.code)
_QUEUE_REFUSALS = (ModelOverloaded.code, ModelNotReady.code)


class RayGatewayMetrics:
    """Counts finished requests. Label values are routes and models of the config: bounded."""

    def __init__(self) -> None:
        self._requests = Counter(
            "comp_ai_requests", "Requests ended.", (*_LABELS, "status", "outcome")
        )
        self._refused = Counter("comp_ai_limits_refused", "Requests over a limit.", _LABELS)
        self._retried = Counter(
            "comp_ai_retries", "Requests asked again of another replica.", ("model",)
        )
        self._dropped = Counter(
            "comp_ai_log_dropped", "Requests that ended without a record.", ("outcome",)
        )
        self._waiting = Gauge(
            "comp_ai_queue_waiting", "Requests that wait in this gateway.", ("app",)
        )
        self._queue_refused = Counter(
            "comp_ai_queue_refused", "Requests refused by a queue.", (*_LABELS, "code")
        )
        self._sign_ins_failed = Counter(
            "comp_ai_sign_ins_failed", "Sign-ins that failed.", ("credential", "limited")
        )
        self._prompt_tokens = Counter("comp_ai_prompt_tokens", "Prompt tokens.", _LABELS)
        self._completion_tokens = Counter(
            "comp_ai_completion_tokens", "Completion tokens.", _LABELS
        )
        self._duration_s = Histogram(
            "comp_ai_request_duration_s", "Whole time of a request.", _DURATIONS_S, _LABELS
        )
        self._steps_s = {
            "auth_ms": Histogram("comp_ai_auth_s", "Time to authenticate.", _STEPS_S, _LABELS),
            "limits_ms": Histogram("comp_ai_limits_s", "Time to reserve.", _STEPS_S, _LABELS),
            "queue_ms": Histogram("comp_ai_queue_s", "Wait for a replica.", _DURATIONS_S, _LABELS),
            "time_to_first_token_ms": Histogram(
                "comp_ai_time_to_first_token_s", "Time to first token.", _DURATIONS_S, _LABELS
            ),
            "inter_token_mean_ms": Histogram(
                "comp_ai_inter_token_s",
                "Mean time between the tokens of one request.",
                _STEPS_S,
                _LABELS,
            ),
        }

    def request_finished(self, record: RequestRecord, model_label: str) -> None:
        """Count `record`."""
        labels = {"route": record.route, "model": model_label}
        outcome = {"status": str(record.status), "outcome": record.outcome.value}
        self._requests.inc(1, labels | outcome)
        self._duration_s.observe(record.duration_ms / 1000, labels)
        for field, histogram in self._steps_s.items():
            if (milliseconds := getattr(record, field)) is not None:
                histogram.observe(milliseconds / 1000, labels)
        if record.error_code in _LIMIT_REFUSALS:
            self._refused.inc(1, labels)
        if record.error_code in _QUEUE_REFUSALS:
            self._queue_refused.inc(1, labels | {"code": record.error_code})
        # Ray refuses an increase by nothing.
        if record.prompt_tokens:
            self._prompt_tokens.inc(record.prompt_tokens, labels)
        if record.completion_tokens:
            self._completion_tokens.inc(record.completion_tokens, labels)

    def sign_in_failed(self, kind: CredentialKind, *, limited: bool) -> None:
        """See `SignInMetrics.sign_in_failed`."""
        self._sign_ins_failed.inc(1, {"credential": kind.value, "limited": str(limited).lower()})

    def request_retried(self, model_label: str) -> None:
        """Count it."""
        self._retried.inc(1, {"model": model_label})

    def record_dropped(self, outcome: Outcome) -> None:
        """Count it."""
        self._dropped.inc(1, {"outcome": outcome.value})

    def requests_waiting(self, app: str, requests: int) -> None:
        """Set the gauge."""
        self._waiting.set(requests, {"app": app})


class RayBatchMetrics:
    """Counts what a gateway does for batches."""

    def __init__(self) -> None:
        self._lines = Counter(
            "comp_ai_batch_lines", "Requests of batches that ended here.", ("result",)
        )
        self._open = Gauge("comp_ai_batches_open", "Batches that have not ended.", ("status",))

    def line_ended(self, result: str) -> None:
        """See `BatchMetrics.line_ended`."""
        self._lines.inc(1, {"result": result})

    def batches_open(self, counts: Mapping[str, int]) -> None:
        """See `BatchMetrics.batches_open`."""
        for status, count in counts.items():
            self._open.set(count, {"status": status})
