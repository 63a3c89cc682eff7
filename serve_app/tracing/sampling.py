"""Which requests are traced."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from serve_app.timing import Lap
from serve_app.tracing.context import SpanContext, new_span_id, new_trace_id, parse


@dataclass(frozen=True, slots=True)
class RequestTrace:
    """The place of one request in its trace: its own span, and the caller's where there is one."""

    own: SpanContext
    parent: SpanContext | None = None

    def below(self, lap: Lap) -> SpanContext:
        """Return the span of a stage, so that what it calls elsewhere hangs below it."""
        if not self.own.sampled:
            return self.own
        if lap.span_id is None:
            lap.span_id = new_span_id()
        return SpanContext(self.own.trace_id, lap.span_id, sampled=True)


@dataclass(frozen=True, slots=True)
class Sampling:
    """Decides once for each request, when it comes in; everything behind keeps to that.

    A client's `traceparent` says where its trace goes on. One that says that the client itself
    does not trace is obeyed: the trace would lack its root. One that says that it does counts
    as one of `ratio`, unless `trust_parents`: else a client could have itself traced at will. The
    lot is drawn here and not from the trace's id, which a client may choose.
    """

    ratio: float
    trust_parents: bool = False
    draw: Callable[[], float] = random.random

    def begin(self, traceparent: str | None) -> RequestTrace:
        """Return the place of a request that came with this header."""
        parent = parse(traceparent)
        if parent is None:
            return RequestTrace(SpanContext(new_trace_id(), new_span_id(), self._drawn()))
        own = SpanContext(parent.trace_id, new_span_id(), self._sampled(parent))
        return RequestTrace(own, None if parent.made_by_nginx else parent)

    def _sampled(self, parent: SpanContext) -> bool:
        if parent.made_by_nginx:
            return self._drawn()
        return parent.sampled and (self.trust_parents or self._drawn())

    def _drawn(self) -> bool:
        return self.draw() < self.ratio
