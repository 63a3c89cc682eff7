"""The spans of the request log.

record                the gateway's stage
└─ spool              until the record is on disk

drain                 a trace of its own, linked to the requests whose rows it has moved
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from serve_app.records import RequestRecord
from serve_app.tracing.context import SpanContext, new_span_id, new_trace_id, parse
from serve_app.tracing.spans import Span, SpanSink

# Of a batch of a thousand rows not all are named.
_MOST_LINKS = 100


class LogSpans:
    """Makes spans of what the log does for records that are traced."""

    def __init__(self, sink: SpanSink | None) -> None:
        self._sink = sink

    def spooling(self, record: RequestRecord) -> AbstractContextManager[None]:
        """Return a block that makes a span of itself, if `record` is traced."""
        if self._sink is None or (parent := parse(record.traceparent)) is None:
            return nullcontext()
        return _spooling(self._sink, parent)

    def moved(self, records: Sequence[RequestRecord], seconds: float, written: int) -> None:
        """Make a span of a batch that PostgreSQL has now, if some of it is traced."""
        if self._sink is None:
            return
        traced = [one for record in records if (one := parse(record.traceparent)) is not None]
        if not traced:
            return
        ended_ns = time.time_ns()
        span = Span(
            name="drain",
            context=SpanContext(new_trace_id(), new_span_id(), sampled=True),
            parent=None,
            begun_ns=ended_ns - int(seconds * 1e9),
            ended_ns=ended_ns,
            attributes={"comp_ai.rows": len(records), "comp_ai.rows_written": written},
            links=traced[:_MOST_LINKS],
        )
        self._sink.take([span])


@contextmanager
def _spooling(sink: SpanSink, parent: SpanContext) -> Iterator[None]:
    begun_ns = time.time_ns()
    done = False
    try:
        yield
        done = True
    finally:
        span = Span(
            name="spool",
            context=parent.sibling(),
            parent=parent,
            begun_ns=begun_ns,
            ended_ns=time.time_ns(),
            failed=not done,
        )
        sink.take([span])
