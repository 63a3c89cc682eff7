"""Spans of the processes in Ray, and how many of them arrive."""

from __future__ import annotations

from ray import serve
from ray.serve.metrics import Counter

from serve_app.settings import TracingSettings
from serve_app.tracing.build import build_sink
from serve_app.tracing.spans import SpanResult, SpanSink


class RaySpanMetrics:
    """Counts spans; they come out as `ray_comp_ai_tracing_spans_total`."""

    def __init__(self) -> None:
        self._spans = Counter(
            "comp_ai_tracing_spans", "Spans, by what became of them.", ("result",)
        )

    def spans_ended(self, result: SpanResult, spans: int) -> None:
        """See `SpanMetrics.spans_ended`."""
        self._spans.inc(spans, {"result": result.value})


def replica_sink(settings: TracingSettings, part: str) -> SpanSink | None:
    """Return where the spans of this replica go, or None while tracing is off."""
    instance = str(serve.get_replica_context().replica_id.unique_id)
    return build_sink(settings, part, instance, RaySpanMetrics)
