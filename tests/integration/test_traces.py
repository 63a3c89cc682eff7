"""Traces as a collector gets them: of a request through nginx, gateway, replica and log."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import orjson
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from serve_app.accounts.request_log import RequestLog
from serve_app.accounts.spool import Spool
from serve_app.completions.spans import FIRST_TOKEN
from serve_app.fake_engine import FakeEngineConfig
from serve_app.settings import PostgresSettings
from serve_app.timing import Stage
from serve_app.tracing.otlp import OtlpSink
from serve_app.tracing.spans import SpanResult
from tests.integration.collector import Collector, CountedSpans, collector, parents, value
from tests.integration.doors import door
from tests.integration.fakes import AUTHORIZATION, KEY, World, client, until, world
from tests.sealing import FORM, subject_keys

CHAT = "/v1/chat/completions"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PROMPT = "marker-of-the-prompt one two"
# Every word of the fake engine's answers begins so.
ANSWER = "w0 w1 w2 w3 w4 "
NO_URL = "http://127.0.0.1:9/v1/traces"
STAGES = {stage.value for stage in Stage}


def ask(**more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": PROMPT}]
    return {"model": "small", "max_tokens": 5, "messages": messages, **more}


@asynccontextmanager
async def traced(**options: Any) -> AsyncIterator[tuple[World, Collector]]:
    """Serve a world whose every request is traced; its spans have arrived when the block ends."""
    async with collector() as collected:
        sink = OtlpSink(collected.url, {"service.name": "tests"}, CountedSpans())
        async with world(sink=sink, **options) as served:
            yield served, collected
        await sink.close()


async def failing(scope: Scope, receive: Receive, send: Send) -> None:
    """An engine that fails."""
    request = Request(scope, receive)
    await request.body()
    await JSONResponse({"error": {"message": "out of memory"}}, 500)(scope, receive, send)


class NoLogMetrics:
    def __getattr__(self, _: str) -> Any:
        return lambda *_: None


async def test_a_request_is_one_trace_from_nginx_to_postgresql(
    tmp_path: Path, database: PostgresSettings, connection: asyncpg.Connection
) -> None:
    async with traced() as (served, collected):
        with door(served) as port:
            address = f"http://127.0.0.1:{port}{CHAT}"
            async with httpx.AsyncClient(headers=AUTHORIZATION, trust_env=False) as http:
                answer = await http.post(address, json=ask(stream=True))
        row = await served.the_record()
        # In production the record comes by way of Ray.
        assert served.tracing is not None
        log = RequestLog(
            spool=Spool(tmp_path, form=FORM),
            postgres=database,
            keys=subject_keys(),
            metrics=NoLogMetrics(),
            sink=served.tracing.sink,
        )
        await log.start()
        await log.append(row)
        assert await log.drain(20)
        await log.close()
    request_id = answer.headers["x-request-id"]
    drain = collected.the("drain")
    spans = [span for span in collected.spans if span.name != "drain"]
    # nginx's access log names the request by the id of its trace.
    assert {span.trace_id.hex() for span in spans} == {request_id}
    assert parents(spans) == {
        "chat small": None,
        **dict.fromkeys(STAGES, "chat small"),
        FIRST_TOKEN: "relay",
        "replica": "relay",
        "spool": "record",
    }
    assert collected.the("chat small").parent_span_id == b""
    [link] = drain.links
    assert (link.trace_id.hex(), link.span_id) == (request_id, collected.the("record").span_id)
    assert await connection.fetchval("select trace_id from comp_ai.requests") == request_id
    [line] = served.lines.getvalue().splitlines()
    assert orjson.loads(line)["trace_id"] == request_id


async def test_the_attributes_are_those_of_the_conventions() -> None:
    async with traced() as (served, collected), client(served) as http:
        await http.post(CHAT, json=ask(stream=True), headers={"x-request-id": "mine"})
        row = await served.the_record()
    root = collected.the("chat small")
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "small",
        "gen_ai.request.stream": True,
        "gen_ai.usage.input_tokens": row.prompt_tokens,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.response.finish_reasons": ["length"],
        "http.response.status_code": 200,
        "comp_ai.request.id": str(row.id),
        "comp_ai.x_request_id": "mine",
        "comp_ai.outcome": "completed",
        "comp_ai.route": "chat.completions",
        "error.type": None,
    }
    assert {key: value(root, key) for key in expected} == expected
    host, port = served.replica.server.address.split(":")
    relay = collected.the("relay")
    assert (value(relay, "server.address"), value(relay, "server.port")) == (host, int(port))
    # In the same clock as the record: within what it is rounded to.
    waited = collected.the("lease")
    waited_ms = (waited.end_time_unix_nano - waited.start_time_unix_nano) / 1e6
    assert row.queue_ms == pytest.approx(waited_ms, abs=0.002)


async def test_a_clients_trace_goes_on() -> None:
    async with traced() as (served, collected), client(served) as http:
        header = f"00-{TRACE}-{PARENT}-01"
        await http.post(CHAT, json=ask(), headers={"traceparent": header})
        await http.post(CHAT, json=ask(), headers={"traceparent": header[:-1] + "0"})
        await served.quiet(2)
    assert {span.trace_id.hex() for span in collected.spans} == {TRACE}
    assert collected.the("chat small").parent_span_id.hex() == PARENT
    assert [row.trace_id for row in served.records] == [TRACE, None]


async def test_a_refusal_is_traced_as_far_as_it_came() -> None:
    async with traced() as (served, collected), client(served) as http:
        wrong = {"authorization": "Bearer wrong-key-marker"}
        assert (await http.post(CHAT, json=ask(), headers=wrong)).status_code == 401
        await served.quiet()
    assert {span.name for span in collected.spans} == {"chat", "admit", "authenticate", "record"}
    assert value(collected.the("chat"), "error.type") == "invalid_api_key"
    assert collected.the("authenticate").status.code == 2
    # A client's fault is none of the service.
    assert collected.the("chat").status.code == 0


async def test_an_engine_that_fails() -> None:
    async with traced(engine_app=failing) as (served, collected), client(served) as http:
        assert (await http.post(CHAT, json=ask())).status_code == 502
        await served.quiet()
    root = collected.the("chat small")
    assert (value(root, "comp_ai.outcome"), root.status.code) == ("failed", 2)
    assert collected.named("relay")[0].status.code == 2
    assert collected.the("replica").status.code == 2


async def test_a_second_replica_is_asked_in_the_same_trace() -> None:
    async with (
        traced(engine_app=failing, replicas=2) as (served, collected),
        client(served) as http,
    ):
        assert (await http.post(CHAT, json=ask())).status_code == 200
        await served.quiet()
    first, second = collected.named("relay")
    assert [span.status.code for span in (first, second)] == [2, 0]
    assert len(collected.named("lease")) == 2
    replicas = {span.parent_span_id: span for span in collected.named("replica")}
    for relay, name in ((first, "replica-1"), (second, "replica-2")):
        assert value(relay, "comp_ai.replica_id") == name
        assert value(replicas[relay.span_id], "comp_ai.replica_id") == name
    assert collected.the(FIRST_TOKEN).parent_span_id == second.span_id
    assert len({span.trace_id for span in collected.spans}) == 1


async def test_a_client_that_leaves_leaves_its_trace() -> None:
    slow = FakeEngineConfig(time_to_first_token_s=0.0, time_per_token_s=60.0)
    async with traced(speed=slow) as (served, collected), client(served) as http:
        request = asyncio.create_task(http.post(CHAT, json=ask(stream=True)))
        await until(lambda: served.replica.counters.requests_running == 1)
        request.cancel()
        await served.quiet()
    root = collected.the("chat small")
    assert value(root, "comp_ai.outcome") == "cancelled"
    assert (value(root, "http.response.status_code"), root.status.code) == (499, 0)
    assert collected.the("relay").status.code == 2
    assert collected.named("replica")


@pytest.mark.parametrize("stream", [True, False])
async def test_no_secret_and_no_text_is_exported(stream: bool) -> None:
    async with traced() as (served, collected), client(served) as http:
        answer = await http.post(CHAT, json=ask(stream=stream, user="marker-of-the-user"))
        assert "w0" in answer.text
        unknown = ask(model="marker-of-a-model")
        assert (await http.post(CHAT, json=unknown)).status_code == 404
        wrong = {"authorization": "Bearer wrong-key-marker"}
        await http.post(CHAT, json=ask(), headers=wrong)
        await served.quiet(3)
    assert "chat small" in collected.text
    for secret in ("marker", KEY, "Bearer", "w0", "w4", ANSWER, "user-1"):
        assert secret not in collected.text, secret


async def test_a_collector_that_is_away_costs_no_request_and_is_counted() -> None:
    metrics = CountedSpans()
    sink = OtlpSink(NO_URL, {"service.name": "tests"}, metrics)
    async with world(sink=sink) as served, client(served) as http:
        answers = [await http.post(CHAT, json=ask()) for _ in range(3)]
        await served.quiet(3)
    await sink.close()
    assert [answer.status_code for answer in answers] == [200] * 3
    # Ten of the gateway's and one of the replica's for each.
    assert metrics.by_result == {SpanResult.FAILED: 33}


async def test_a_collector_that_refuses_is_counted() -> None:
    metrics = CountedSpans()
    async with collector() as collected:
        collected.status = 400
        sink = OtlpSink(collected.url, {"service.name": "tests"}, metrics)
        async with world(sink=sink) as served, client(served) as http:
            assert (await http.post(CHAT, json=ask())).status_code == 200
        await sink.close()
    assert metrics.by_result == {SpanResult.FAILED: 11}


async def test_spans_without_room_are_dropped_and_counted() -> None:
    metrics = CountedSpans()
    async with collector() as collected:
        sink = OtlpSink(collected.url, {"service.name": "tests"}, metrics, queue_spans=4)
        async with world(sink=sink) as served, client(served) as http:
            assert (await http.post(CHAT, json=ask())).status_code == 200
        await sink.close()
        # A trace is whole or not there: the gateway's ten have no room.
        assert [span.name for span in collected.spans] == ["replica"]
        sink.take([])
    assert metrics.by_result == {SpanResult.DROPPED: 10, SpanResult.EXPORTED: 1}
