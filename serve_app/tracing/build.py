"""The way of a process's spans out, where tracing is on."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata

from serve_app.settings import TracingSettings
from serve_app.tracing.spans import SpanMetrics, SpanSink


def build_sink(
    settings: TracingSettings, part: str, instance: str, metrics: Callable[[], SpanMetrics]
) -> SpanSink | None:
    """Return where spans go, or None while tracing is off.

    `part` and `instance` say in traces which process of ours made a span.
    """
    if settings.url is None:
        return None
    # Here and not above: while tracing is off no process loads the SDK.
    from serve_app.tracing.otlp import OtlpSink

    resource = {
        "service.name": f"{settings.service}-{part}",
        "service.version": metadata.version("comp-ai"),
        "service.instance.id": instance,
    }
    return OtlpSink(settings.url, resource, metrics())
