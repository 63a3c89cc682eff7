"""A collector of traces that keeps what comes: OTLP over HTTP, as the specification has it."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from serve_app.tracing.spans import SpanResult

HOST = "127.0.0.1"


class Collector:
    """What was posted: the bytes, and the spans in them."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.status = 200
        self.url = ""

    async def take(self, request: web.Request) -> web.Response:
        """Answer one export."""
        self.bodies.append(await request.read())
        answer = ExportTraceServiceResponse().SerializeToString()
        return web.Response(body=answer, status=self.status, content_type="application/x-protobuf")

    @property
    def spans(self) -> list[Span]:
        """All spans."""
        return [span for _, span in self.spans_by_service]

    @property
    def spans_by_service(self) -> list[tuple[str, Span]]:
        """All spans, with the name of the service that made them."""
        found = []
        for body in self.bodies:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                [service] = [
                    one.value.string_value
                    for one in resource.resource.attributes
                    if one.key == "service.name"
                ]
                found += [(service, span) for scope in resource.scope_spans for span in scope.spans]
        return found

    @property
    def text(self) -> str:
        """All that was posted, as text, without the ids: among random bytes stands any word."""
        found = []
        for body in self.bodies:
            request = ExportTraceServiceRequest.FromString(body)
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        for one in (span, *span.links):
                            one.ClearField("trace_id")
                            one.ClearField("span_id")
                        span.ClearField("parent_span_id")
            found.append(str(request))
        return "".join(found)

    def named(self, name: str) -> list[Span]:
        """Return the spans with this name, the first that began first."""
        found = [span for span in self.spans if span.name == name]
        return sorted(found, key=lambda span: span.start_time_unix_nano)

    def the(self, name: str) -> Span:
        """Return the only span with this name."""
        [span] = self.named(name)
        return span


@asynccontextmanager
async def collector(port: int = 0) -> AsyncIterator[Collector]:
    """Serve a collector until the block ends, where `port` is 0 at a free port."""
    made = Collector()
    app = web.Application()
    app.router.add_post("/v1/traces", made.take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, HOST, port).start()
    made.url = f"http://{HOST}:{runner.addresses[0][1]}/v1/traces"
    try:
        yield made
    finally:
        await runner.cleanup()


class CountedSpans:
    """Counts what became of spans."""

    def __init__(self) -> None:
        self.by_result: Counter[SpanResult] = Counter()

    def spans_ended(self, result: SpanResult, spans: int) -> None:
        """See `SpanMetrics.spans_ended`."""
        self.by_result[result] += spans


def value(span: Span, key: str) -> object:
    """Return an attribute of `span`, or None."""
    for one in span.attributes:
        if one.key == key:
            kind = one.value.WhichOneof("value")
            if kind == "array_value":
                return [item.string_value for item in one.value.array_value.values]
            return getattr(one.value, kind)
    return None


def parents(spans: Sequence[Span]) -> dict[str, str | None]:
    """Return the name of each span and of its parent, where that is among them."""
    names = {span.span_id: span.name for span in spans}
    return {span.name: names.get(span.parent_span_id) for span in spans}
