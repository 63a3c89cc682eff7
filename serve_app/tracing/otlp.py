"""Spans on their way to a collector, by OpenTelemetry's SDK: OTLP over HTTP.

Imported only where tracing is on. The SDK keeps a queue and a thread that empties it; requests
meet neither. Its own API makes a span where it begins; here spans are made when they have ended,
of times that were taken anyway, and so its exporter is given them finished.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence

import requests
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, Status, StatusCode, TraceFlags
from opentelemetry.trace import SpanContext as OtelContext
from opentelemetry.trace import SpanKind as OtelKind

from serve_app.tracing.context import SpanContext
from serve_app.tracing.spans import Span, SpanKind, SpanMetrics, SpanResult

logger = logging.getLogger(__name__)

# A span takes a kilobyte or two here.
_QUEUE_SPANS = 4096
_BATCH_SPANS = 512
_EVERY_S = 1.0
# For one batch with all its tries. Meanwhile the queue fills, and what has no room is counted.
_EXPORT_TIMEOUT_S = 5.0
# Of a process that ends. Spans are not worth a longer stop.
_CLOSE_S = 3.0
_KINDS = {
    SpanKind.INTERNAL: OtelKind.INTERNAL,
    SpanKind.SERVER: OtelKind.SERVER,
    SpanKind.CLIENT: OtelKind.CLIENT,
}
_SCOPE = InstrumentationScope("comp-ai")
_UNSET, _ERROR = Status(StatusCode.UNSET), Status(StatusCode.ERROR)


class OtlpSink:
    """Sends spans to the OTLP endpoint at `url`. See `SpanSink`.

    Args:
        resource: what is said of this process on all its spans.
        queue_spans: most spans that wait.
    """

    def __init__(
        self,
        url: str,
        resource: Mapping[str, str],
        metrics: SpanMetrics,
        *,
        queue_spans: int = _QUEUE_SPANS,
    ) -> None:
        self._resource = Resource(dict(resource))
        self._metrics = metrics
        self._queue_spans = queue_spans
        self._exporter = _Counted(_exporter(url), metrics)
        self._processor = BatchSpanProcessor(
            self._exporter,
            max_queue_size=queue_spans,
            schedule_delay_millis=_EVERY_S * 1000,
            max_export_batch_size=min(_BATCH_SPANS, queue_spans),
        )
        self._offered = 0
        self._closed = False

    def take(self, spans: Sequence[Span]) -> None:
        """See `SpanSink.take`. Room is counted here: the SDK's own queue drops in silence."""
        waiting = self._offered - self._exporter.taken
        if self._closed or waiting + len(spans) > self._queue_spans:
            self._metrics.spans_ended(SpanResult.DROPPED, len(spans))
            return
        self._offered += len(spans)
        for span in spans:
            self._processor.on_end(self._finished(span))

    async def close(self) -> None:
        """See `SpanSink.close`."""
        self._closed = True
        loop = asyncio.get_running_loop()
        patience = loop.call_later(_CLOSE_S, self._exporter.give_up)
        try:
            # It waits for the thread that exports.
            await asyncio.to_thread(self._processor.shutdown)
        finally:
            patience.cancel()

    def _finished(self, span: Span) -> ReadableSpan:
        return ReadableSpan(
            name=span.name,
            context=_context(span.context),
            parent=None if span.parent is None else _context(span.parent),
            resource=self._resource,
            attributes=span.attributes,
            links=[Link(_context(one)) for one in span.links],
            kind=_KINDS[span.kind],
            status=_ERROR if span.failed else _UNSET,
            start_time=span.begun_ns,
            end_time=span.ended_ns,
            instrumentation_scope=_SCOPE,
        )


class _Counted(SpanExporter):
    """Counts what the thread of the SDK takes from the queue, and what becomes of it."""

    def __init__(self, exporter: OTLPSpanExporter, metrics: SpanMetrics) -> None:
        self._exporter = exporter
        self._metrics = metrics
        self._given_up = False
        self.taken = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send one batch."""
        self.taken += len(spans)
        result = SpanExportResult.FAILURE if self._given_up else self._exporter.export(spans)
        done = result is SpanExportResult.SUCCESS
        self._metrics.spans_ended(SpanResult.EXPORTED if done else SpanResult.FAILED, len(spans))
        return result

    def give_up(self) -> None:
        """Try no more, and end the pause between two tries."""
        self._given_up = True
        self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def shutdown(self) -> None:
        """Close the connection."""
        if not self._given_up:
            self.give_up()


def _exporter(url: str) -> OTLPSpanExporter:
    session = requests.Session()
    # Spans go to the collector that was named, not by way of a proxy that stands in HTTP_PROXY.
    session.trust_env = False
    return OTLPSpanExporter(endpoint=url, timeout=_EXPORT_TIMEOUT_S, session=session)


def _context(context: SpanContext) -> OtelContext:
    return OtelContext(
        trace_id=int(context.trace_id, 16),
        span_id=int(context.span_id, 16),
        is_remote=False,
        trace_flags=TraceFlags(TraceFlags.SAMPLED if context.sampled else TraceFlags.DEFAULT),
    )
