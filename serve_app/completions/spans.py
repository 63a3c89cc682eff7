"""The spans of one request, made of its clock once it has ended.

    chat small                      the whole request, but for its last byte
    ├─ admit, authenticate, authorize, reserve, lease
    ├─ relay                        the replica's span hangs below it, and the engine's below that
    │  └─ time to first token
    └─ settle, record               the log's span hangs below `record`

No prompt, answer, credential, address or name of a person is in them: who asked stands in the
row of the request, which `comp_ai.request.id` leads to and which can be erased.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from serve_app.completions.exchange import Exchange
from serve_app.contracts import LeaseGrant
from serve_app.records import RequestRecord
from serve_app.timing import Lap, Stage
from serve_app.tracing.sampling import RequestTrace
from serve_app.tracing.spans import Attribute, Span, SpanKind

# `gen_ai.operation.name` of OpenTelemetry's conventions; the other routes have none there.
_OPERATIONS = {
    "chat.completions": "chat",
    "completions": "text_completion",
    "responses": "chat",
    "embeddings": "embeddings",
}
FIRST_TOKEN = "time to first token"  # noqa: S105  no password


def spans_of(exchange: Exchange, record: RequestRecord, model_label: str) -> list[Span]:
    """Return the spans of a request that is traced; `record` tells how it ended."""
    trace = exchange.trace
    assert trace is not None
    clock = _WallClock(exchange)
    asked = iter(exchange.grants)
    return [
        _request(trace, record, model_label, clock),
        *(_stage(trace, lap, clock, asked) for lap in exchange.timings.laps),
        *_first_token(exchange, trace, clock),
    ]


class _WallClock:
    """Turns the times of one request, of `time.perf_counter`, into ns of the wall clock."""

    def __init__(self, exchange: Exchange) -> None:
        self.begun_ns = int(exchange.created_at.timestamp() * 1e9)
        self._started_s = exchange.started_s
        self.now_s = time.perf_counter()

    def ns(self, at_s: float) -> int:
        return self.begun_ns + int((at_s - self._started_s) * 1e9)


def _request(
    trace: RequestTrace, record: RequestRecord, model_label: str, clock: _WallClock
) -> Span:
    operation = _OPERATIONS.get(record.route, record.route)
    return Span(
        name=operation if record.model is None else f"{operation} {model_label}",
        context=trace.own,
        parent=trace.parent,
        begun_ns=clock.begun_ns,
        ended_ns=clock.ns(clock.now_s),
        kind=SpanKind.SERVER,
        failed=record.status >= 500,
        attributes=dict(_attributes(record, model_label)),
    )


def _attributes(record: RequestRecord, model_label: str) -> Iterator[tuple[str, Attribute]]:
    yield "comp_ai.request.id", str(record.id)
    yield "comp_ai.x_request_id", record.request_id
    yield "comp_ai.route", record.route
    yield "comp_ai.outcome", record.outcome.value
    yield "http.response.status_code", record.status
    if record.error_code is not None:
        yield "error.type", record.error_code
    if record.model is not None:
        yield from _generation(record, model_label)


def _generation(record: RequestRecord, model_label: str) -> Iterator[tuple[str, Attribute]]:
    yield "gen_ai.provider.name", "comp_ai"
    if (operation := _OPERATIONS.get(record.route)) is not None:
        yield "gen_ai.operation.name", operation
    yield "gen_ai.request.model", model_label
    yield "gen_ai.request.stream", record.stream
    yield "gen_ai.usage.input_tokens", record.prompt_tokens
    yield "gen_ai.usage.output_tokens", record.completion_tokens
    if record.finish_reason is not None:
        yield "gen_ai.response.finish_reasons", [record.finish_reason]
    if record.time_to_first_token_ms is not None:
        yield "gen_ai.response.time_to_first_chunk", record.time_to_first_token_ms / 1000


def _stage(trace: RequestTrace, lap: Lap, clock: _WallClock, asked: Iterator[LeaseGrant]) -> Span:
    relay = lap.stage is Stage.RELAY
    return Span(
        name=lap.stage.value,
        context=trace.below(lap),
        parent=trace.own,
        begun_ns=clock.ns(lap.begun_s),
        # One that is still under way ends with the request.
        ended_ns=clock.ns(lap.ended_s or clock.now_s),
        kind=SpanKind.CLIENT if relay else SpanKind.INTERNAL,
        failed=lap.failed,
        # Each replica that was asked has been leased before, in the same order.
        attributes=_replica(next(asked)) if relay else {},
    )


def _replica(grant: LeaseGrant) -> dict[str, Attribute]:
    host, _, port = grant.address.rpartition(":")
    return {
        "comp_ai.replica_id": grant.replica_id,
        "server.address": host,
        "server.port": int(port),
    }


def _first_token(exchange: Exchange, trace: RequestTrace, clock: _WallClock) -> Iterator[Span]:
    """Yield the wait for the first token, within the relay that got it."""
    at_s = exchange.first_token_s
    if at_s is None:
        return
    asked = [
        lap for lap in exchange.timings.laps if lap.stage is Stage.RELAY and lap.begun_s < at_s
    ]
    for lap in asked[-1:]:
        relay = trace.below(lap)
        yield Span(
            name=FIRST_TOKEN,
            context=relay.sibling(),
            parent=relay,
            begun_ns=clock.ns(lap.begun_s),
            ended_ns=clock.ns(at_s),
        )
