"""Traces: what a `traceparent` says, who is traced, and the spans made of a request's clock."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message, Receive, Scope, Send

from serve_app.accounts.log_spans import LogSpans
from serve_app.completions.exchange import Exchange
from serve_app.completions.spans import FIRST_TOKEN, spans_of
from serve_app.contracts import LeaseGrant
from serve_app.errors import ClientGone, ConfigError, EngineFailed
from serve_app.records import RequestRecord
from serve_app.settings import TracingSettings, load_settings
from serve_app.timing import Stage
from serve_app.tracing.context import SpanContext, new_span_id, new_trace_id, parse
from serve_app.tracing.replica import TracedApp
from serve_app.tracing.sampling import Sampling
from serve_app.tracing.spans import Span, SpanKind

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"
NGINX = f"00-{TRACE}-{TRACE[:16]}-00"


class Kept:
    """Keeps spans."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def take(self, spans: Sequence[Span]) -> None:
        """See `SpanSink.take`."""
        self.spans += spans

    async def close(self) -> None:
        """See `SpanSink.close`."""


# The header.


def test_a_traceparent_is_read() -> None:
    assert parse(SAMPLED) == SpanContext(TRACE, PARENT, sampled=True)
    assert parse(UNSAMPLED) == SpanContext(TRACE, PARENT, sampled=False)
    # Other flags are there for later versions.
    assert parse(f"00-{TRACE}-{PARENT}-fe") == SpanContext(TRACE, PARENT, sampled=False)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "00-1-1-01",
        f"ff-{TRACE}-{PARENT}-01",
        f"01-{TRACE}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"{SAMPLED}-more",
        f"{SAMPLED}\n",
        f" {SAMPLED}",
        f"00-{TRACE}-{PARENT}-1",
        SAMPLED.replace("4", "\N{ARABIC-INDIC DIGIT FOUR}"),
    ],
)
def test_what_is_no_traceparent_is_as_none(header: str | None) -> None:
    assert parse(header) is None


@given(st.text(max_size=80))
def test_no_header_fails(header: str) -> None:
    parse(header)


def test_what_is_written_is_read_again() -> None:
    for sampled in (True, False):
        one = SpanContext(new_trace_id(), new_span_id(), sampled)
        assert parse(one.traceparent) == one
        assert (one.sibling().trace_id, one.sibling().sampled) == (one.trace_id, sampled)
        assert one.sibling().span_id != one.span_id


# Who is traced.


@pytest.mark.parametrize(
    ("header", "trust_parents", "drawn", "sampled"),
    [
        (None, False, True, True),
        (None, False, False, False),
        (NGINX, False, True, True),
        (NGINX, True, False, False),
        # A client cannot have itself traced beyond the ratio, unless it is trusted.
        (SAMPLED, False, True, True),
        (SAMPLED, False, False, False),
        (SAMPLED, True, False, True),
        # Its trace would lack its root.
        (UNSAMPLED, False, True, False),
        (UNSAMPLED, True, True, False),
        ("not valid", True, True, True),
        ("not valid", True, False, False),
    ],
)
def test_who_is_traced(header: str | None, trust_parents: bool, drawn: bool, sampled: bool) -> None:
    lot = 0.0999 if drawn else 0.1
    trace = Sampling(0.1, trust_parents, draw=lambda: lot).begin(header)
    assert trace.own.sampled is sampled


def test_a_ratio_of_0_traces_nothing_and_of_1_everything() -> None:
    assert not Sampling(0.0, draw=lambda: 0.0).begin(None).own.sampled
    assert Sampling(1.0, draw=lambda: 0.999999).begin(None).own.sampled


def test_the_share_does_not_hang_on_the_ids_that_clients_choose() -> None:
    """Sampled by the trace's id, a client that found a lucky one would always be traced."""
    lucky = f"00-{'0' * 31}1-{PARENT}-01"
    sampling = Sampling(0.1)
    traced = sum(sampling.begin(lucky).own.sampled for _ in range(2000))
    assert 100 < traced < 300  # 200 ± 7 standard deviations


def test_the_trace_of_a_client_goes_on() -> None:
    trace = Sampling(1.0).begin(SAMPLED)
    assert trace.parent == SpanContext(TRACE, PARENT, sampled=True)
    assert trace.own.trace_id == TRACE
    assert trace.own.span_id not in (PARENT, TRACE[:16])


def test_what_nginx_made_gives_the_id_of_the_trace_and_no_parent() -> None:
    trace = Sampling(1.0).begin(NGINX)
    assert (trace.own.trace_id, trace.parent) == (TRACE, None)


# Spans of a request.


def traced_exchange(header: str | None = SAMPLED) -> Exchange:
    trace = Sampling(1.0).begin(header)
    return Exchange(
        route="chat.completions", request_id="r-1", client_address="10.0.0.1", trace=trace
    )


def spans_by_name(exchange: Exchange) -> dict[str, Span]:
    record = exchange.record()
    return {span.name: span for span in spans_of(exchange, record, "small")}


def test_the_spans_stand_on_the_clock_of_server_timing() -> None:
    one = traced_exchange()
    one.model = "small"
    for stage in Stage:
        with one.timings.lap(stage):
            if stage is Stage.RELAY:
                one.grants.append(LeaseGrant(address="10.1.2.3:8000", token="t", replica_id="r1"))
                one.token_arrived()
    spans = spans_by_name(one)
    root = spans.pop("chat small")
    assert one.trace is not None
    assert (root.context, root.parent, root.kind) == (
        one.trace.own,
        one.trace.parent,
        SpanKind.SERVER,
    )
    first = spans.pop(FIRST_TOKEN)
    assert first.parent == spans["relay"].context
    assert spans.keys() == {stage.value for stage in Stage}
    begun_ns = [root.begun_ns]
    for lap in one.timings.laps:
        span = spans[lap.stage]
        assert span.parent == root.context
        assert lap.ended_s is not None
        took_ns = (lap.ended_s - lap.begun_s) * 1e9
        assert abs(span.ended_ns - span.begun_ns - took_ns) < 1000
        begun_ns.append(span.begun_ns)
        assert span.ended_ns <= root.ended_ns
    assert begun_ns == sorted(begun_ns)
    assert spans["relay"].kind is SpanKind.CLIENT
    assert spans["relay"].attributes == {
        "comp_ai.replica_id": "r1",
        "server.address": "10.1.2.3",
        "server.port": 8000,
    }


def test_what_is_asked_elsewhere_hangs_below_the_span_of_its_stage() -> None:
    one = traced_exchange()
    one.grants.append(LeaseGrant(address="10.1.2.3:8000", token="t", replica_id="r1"))
    with one.timings.lap(Stage.RELAY) as lap:
        told = one.below(lap)
    assert told is not None
    assert spans_by_name(one)["relay"].context == told
    assert one.below(lap) == told


def test_a_request_that_is_not_traced_tells_so() -> None:
    one = traced_exchange(UNSAMPLED)
    with one.timings.lap(Stage.RELAY) as lap:
        told = one.below(lap)
    assert told is not None
    assert told.traceparent.startswith(f"00-{TRACE}-")
    assert told.traceparent.endswith("-00")
    assert one.record(told).traceparent is None


def test_a_record_names_its_trace() -> None:
    one = traced_exchange()
    with one.timings.lap(Stage.RECORD) as lap:
        row = one.record(one.below(lap))
    assert row.trace_id == TRACE
    assert RequestRecord.from_json(row.to_json()) == row
    # Of a request that is not traced the spool has no word more than without tracing.
    assert b"trace" not in one.record().to_json()


@pytest.mark.parametrize(
    ("error", "failed", "outcome"),
    [
        (EngineFailed(), True, "failed"),
        (ClientGone(), False, "cancelled"),
        (None, False, "completed"),
    ],
)
def test_how_it_ended(error: Any, failed: bool, outcome: str) -> None:
    one = traced_exchange()
    one.grants.append(LeaseGrant(address="10.1.2.3:8000", token="t", replica_id="r1"))
    one.lease = type("Held", (), {"grant": one.grants[0]})()
    try:
        with one.timings.lap(Stage.RELAY):
            if error is not None:
                raise error
    except (EngineFailed, ClientGone):
        one.fail(error)
    spans = spans_by_name(one)
    assert spans["chat"].failed is failed
    assert spans["chat"].attributes["comp_ai.outcome"] == outcome
    assert spans["chat"].attributes["http.response.status_code"] == one.status
    assert spans["relay"].failed is (error is not None)


def test_a_request_of_a_model_that_there_is_not_has_no_name_of_its_own() -> None:
    one = traced_exchange()
    one.model = "hunter2"
    spans = spans_of(one, one.record(), "(other)")
    assert "hunter2" not in str(spans)


# A replica.


async def _ask(header: str | None, app: Any, sink: Kept) -> None:
    headers = [(b"x-request-id", b"r"), *([(b"traceparent", header.encode())] if header else [])]
    scope: Scope = {"type": "http", "headers": headers}

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        pass

    await TracedApp(app, sink, {"comp_ai.replica_id": "r1"})(scope, receive, send)


def _app(status: int, seen: list[Scope]) -> Any:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    return app


async def test_the_span_of_a_replica_stands_between_the_gateways_and_the_engines() -> None:
    sink, seen = Kept(), []
    await _ask(SAMPLED, _app(200, seen), sink)
    [span] = sink.spans
    assert (span.parent, span.failed) == (parse(SAMPLED), False)
    headers = dict(seen[0]["headers"])
    assert parse(headers[b"traceparent"].decode()) == span.context
    assert headers[b"x-request-id"] == b"r"
    assert span.attributes == {"comp_ai.replica_id": "r1", "http.response.status_code": 200}


@pytest.mark.parametrize("header", [UNSAMPLED, None, "not valid"])
async def test_a_replica_traces_only_what_the_gateway_does(header: str | None) -> None:
    sink, seen = Kept(), []
    await _ask(header, _app(200, seen), sink)
    assert sink.spans == []
    told = [value.decode() for name, value in seen[0]["headers"] if name == b"traceparent"]
    assert told == ([header] if header else [])


async def test_a_replica_that_fails_has_a_span_that_says_so() -> None:
    sink = Kept()
    await _ask(SAMPLED, _app(500, []), sink)

    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await _ask(SAMPLED, broken, sink)
    assert [span.failed for span in sink.spans] == [True, True]


# The log.


def _row(**more: Any) -> RequestRecord:
    return Exchange(route="r", request_id="x", client_address=None, **more).record()


def test_the_log_makes_spans_of_traced_records_alone() -> None:
    sink = Kept()
    one = traced_exchange()
    with one.timings.lap(Stage.RECORD) as lap:
        traced = one.record(one.below(lap))
    log = LogSpans(sink)
    for record in (_row(), traced):
        with log.spooling(record):
            pass
    log.moved([_row()], 0.1, 1)
    [spool] = sink.spans
    assert spool.parent == parse(traced.traceparent)
    log.moved([_row(), traced], 0.1, 2)
    drain = sink.spans[1]
    assert (drain.parent, list(drain.links)) == (None, [parse(traced.traceparent)])
    assert drain.context.trace_id != TRACE
    assert drain.ended_ns - drain.begun_ns == 100_000_000
    assert drain.attributes == {"comp_ai.rows": 2, "comp_ai.rows_written": 2}


def test_a_log_without_tracing_makes_none() -> None:
    log = LogSpans(None)
    one = traced_exchange()
    with one.timings.lap(Stage.RECORD) as lap:
        record = one.record(one.below(lap))
    with log.spooling(record):
        pass
    log.moved([record], 0.1, 1)


# Settings.


@pytest.mark.parametrize(
    ("given_url", "url"),
    [
        ("http://tempo:4318", "http://tempo:4318/v1/traces"),
        ("http://tempo:4318/", "http://tempo:4318/v1/traces"),
        ("https://otlp.example.com/a/v1/traces", "https://otlp.example.com/a/v1/traces"),
    ],
)
def test_the_endpoint(given_url: str, url: str) -> None:
    assert load_settings({"COMP_AI_TRACING_ENDPOINT": given_url}).tracing.url == url


def test_tracing_is_off() -> None:
    assert TracingSettings().url is None


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("COMP_AI_TRACING_ENDPOINT", "tempo:4318"),
        ("COMP_AI_TRACING_ENDPOINT", "http://user:pass@tempo:4318"),
        ("COMP_AI_TRACING_ENDPOINT", "http://tempo:4318/?key=1"),
        ("COMP_AI_TRACING_RATIO", "1.1"),
        ("COMP_AI_TRACING_RATIO", "all"),
        ("COMP_AI_TRACING_SERVICE", "two words"),
        ("COMP_AI_TRACING_TRUST_PARENTS", "perhaps"),
    ],
)
def test_a_wrong_setting_stops_the_start(name: str, wrong: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_settings({name: wrong})
    assert raised.value.setting == name


def test_a_gateway_without_tracing_does_not_load_the_sdk() -> None:
    code = """
import sys
import serve_app.completions.gateway, serve_app.http_app, serve_app.accounts.request_log
import serve_app.tracing.replica
from serve_app.settings import load_settings
from serve_app.tracing.build import build_sink
assert build_sink(load_settings({}).tracing, "gateway", "1", dict) is None
loaded = [name for name in sys.modules if name.startswith(("opentelemetry.sdk", "requests"))]
assert loaded == [], loaded
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
