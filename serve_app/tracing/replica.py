"""The span of a replica: what its HTTP app does for one request of a gateway."""

from __future__ import annotations

import time
from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.tracing.context import HEADER, SpanContext, parse
from serve_app.tracing.spans import Attribute, Span, SpanKind, SpanSink

_NAME = HEADER.encode()


class TracedApp:
    """ASGI middleware: a span for what is traced; the app's own spans hang below it.

    It stands behind the lease door, so a `traceparent` is the gateway's.
    """

    def __init__(self, app: ASGIApp, sink: SpanSink, attributes: Mapping[str, Attribute]) -> None:
        self._app = app
        self._sink = sink
        self._attributes = attributes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        parent = _parent(scope)
        if parent is None or not parent.sampled:
            await self._app(scope, receive, send)
            return
        own = parent.sibling()
        begun_ns = time.time_ns()
        status = 0
        failed = True

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(_below(own, scope), receive, watched)
            failed = status >= 500
        finally:
            self._sink.take(
                [
                    Span(
                        name="replica",
                        context=own,
                        parent=parent,
                        begun_ns=begun_ns,
                        ended_ns=time.time_ns(),
                        kind=SpanKind.SERVER,
                        failed=failed,
                        attributes={**self._attributes, "http.response.status_code": status},
                    )
                ]
            )


def _parent(scope: Scope) -> SpanContext | None:
    for name, value in scope.get("headers", ()):
        if name == _NAME:
            return parse(value.decode("latin-1"))
    return None


def _below(own: SpanContext, scope: Scope) -> Scope:
    others = [(name, value) for name, value in scope["headers"] if name != _NAME]
    return {**scope, "headers": [*others, (_NAME, own.traceparent.encode())]}
