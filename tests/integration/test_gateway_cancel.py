"""A client that goes away, at every step of the path: each step is undone, once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from h2.connection import H2Connection
from h2.events import DataReceived
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from serve_app.fake_engine import FakeEngineConfig
from serve_app.records import Outcome
from serve_app.stack import nginx
from serve_app.stack.ports import pick_free
from tests.integration.fakes import AUTHORIZATION, FAST, World, until, world

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
SLOW_START = FakeEngineConfig(time_to_first_token_s=3600, time_per_token_s=0)
SLOW = FakeEngineConfig(time_to_first_token_s=0, time_per_token_s=0.01)

_NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

# How the gateway learns of it: the connection closes, or Serve cancels the handler.
GoAway = Callable[["Caller"], Awaitable[None]]


@dataclass
class Step:
    """A place on the path: how a request is held there, and what its record then says."""

    name: str
    speed: FakeEngineConfig
    hold: Callable[[World], None]
    reached: Callable[[World], Awaitable[None]]
    outcome: Outcome = Outcome.CANCELLED
    generates: bool = False
    max_tokens: int = 2000
    replicas: int = 1


def _nothing(_: World) -> None:
    return


async def _running(served: World) -> None:
    await until(lambda: served.replica.counters.requests_running == 1)


async def _generating(served: World) -> None:
    await until(lambda: served.replica.counters.completion_tokens >= 5)


def _first_replica_is_away(served: World) -> None:
    served.replica.server.address = "127.0.0.1:9"  # discard: nobody listens
    served.replicas[1].gate.shut()


STEPS = [
    Step(
        "authenticating",
        FAST,
        lambda w: w.authenticator.gate.shut(),
        lambda w: w.authenticator.gate.reached(),
    ),
    Step("reserving", FAST, lambda w: w.limits.gate.shut(), lambda w: w.limits.gate.reached()),
    Step("leasing", FAST, lambda w: w.pool.gate.shut(), lambda w: w.pool.gate.reached()),
    Step("posting", FAST, lambda w: w.replica.gate.shut(), lambda w: w.replica.gate.reached()),
    Step(
        "retrying",
        FAST,
        lambda w: _first_replica_is_away(w),
        lambda w: w.replicas[1].gate.reached(),
        replicas=2,
    ),
    Step("first-token", SLOW_START, _nothing, _running),
    Step("generating", SLOW, _nothing, _generating, generates=True),
    Step(
        "settling",
        FAST,
        lambda w: w.limits.settling.shut(),
        lambda w: w.limits.settling.reached(),
        outcome=Outcome.COMPLETED,
        generates=True,
        max_tokens=5,
    ),
    Step(
        "recording",
        FAST,
        lambda w: w.log.gate.shut(),
        lambda w: w.log.gate.reached(),
        outcome=Outcome.COMPLETED,
        generates=True,
        max_tokens=5,
    ),
]


class Caller:
    """A client with one request under way, in a connection of its own."""

    def __init__(
        self,
        served: World,
        path: str,
        *,
        stream: bool,
        max_tokens: int,
        url: str | None = None,
        http2: bool = False,
    ) -> None:
        body: dict[str, Any] = {"model": "small", "max_tokens": max_tokens, "stream": stream}
        if path == CHAT:
            body["messages"] = [{"role": "user", "content": "one two three"}]
        else:
            body["prompt"] = "one two three"
        self.served = served
        self.received = bytearray()
        self._http = httpx.AsyncClient(
            # Made once: with the system's CAs it takes longer than the request.
            verify=_NO_TLS,
            base_url=url or served.url,
            headers=AUTHORIZATION,
            timeout=30,
            http1=not http2,
            http2=http2,
        )
        self._asking = asyncio.create_task(self._ask(path, body))

    async def _ask(self, path: str, body: dict[str, Any]) -> None:
        async with self._http.stream("POST", path, json=body) as response:
            async for part in response.aiter_raw():
                self.received += part

    async def answered(self) -> None:
        """Wait for the end of the answer."""
        await self._asking

    async def disconnect(self) -> None:
        """Close the connection."""
        self._asking.cancel()
        await asyncio.wait([self._asking])
        # Of HTTP/2 a request alone does not close the connection.
        await self._http.aclose()

    async def close(self) -> None:
        """Close what is left."""
        await self.disconnect()


async def _disconnect(caller: Caller) -> None:
    await caller.disconnect()


async def _cancel(caller: Caller) -> None:
    caller.served.app.cancel()


async def _both(caller: Caller) -> None:
    await caller.disconnect()
    caller.served.app.cancel()


@asynccontextmanager
async def calling(served: World, path: str, **how: Any) -> AsyncIterator[Caller]:
    """Ask, and close the connection at the end."""
    caller = Caller(served, path, **how)
    try:
        yield caller
    finally:
        await caller.close()


@asynccontextmanager
async def behind_nginx(served: World) -> AsyncIterator[str]:
    """Put the real nginx in front, and yield its URL."""
    listen = f"127.0.0.1:{pick_free(1)[0]}"
    server = nginx.prepare(
        {
            "COMP_AI_NGINX_LISTEN": listen,
            "COMP_AI_NGINX_UPSTREAM": served.server.address,
            "COMP_AI_NGINX_LOG": "/dev/null",
        }
    )
    process = await asyncio.create_subprocess_exec(*server.command)
    try:
        async with httpx.AsyncClient(base_url=f"http://{listen}") as http:
            while not await _listens(http):  # noqa: ASYNC110 - nginx has no event for us
                await asyncio.sleep(0.02)
        yield f"http://{listen}"
    finally:
        process.terminate()
        await process.wait()
        server.remove()


async def _listens(http: httpx.AsyncClient) -> bool:
    try:
        return (await http.get("/nothing")).status_code == 404
    except httpx.TransportError:
        return False


def _let_go(served: World) -> None:
    for gate in (served.authenticator.gate, served.limits.settling, served.log.gate):
        gate.open()


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("path", [CHAT, TEXT], ids=["chat", "text"])
@pytest.mark.parametrize("go_away", [_disconnect, _cancel, _both], ids=lambda f: f.__name__[1:])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
async def test_client_goes_away(step: Step, go_away: GoAway, path: str, stream: bool) -> None:
    async with world(step.speed, replicas=step.replicas) as served:
        step.hold(served)
        async with calling(served, path, stream=stream, max_tokens=step.max_tokens) as caller:
            await step.reached(served)
            await go_away(caller)
            await _check(step, served, caller)


async def _check(step: Step, served: World, caller: Caller) -> None:
    """Check that each step was undone once, and that the record says what happened."""
    if step.name in ("authenticating", "settling", "recording"):
        # Not interrupted by a closed connection: there is nothing to stop yet, or nothing left
        # to stop.
        _let_go(served)
    row = await served.the_record()
    assert row.outcome is step.outcome
    assert row.status == (200 if step.outcome is Outcome.COMPLETED else 499)
    assert b"[DONE]" not in caller.received
    served.assert_accounts_add_up()
    assert (row.completion_tokens > 0) is step.generates
    assert set(served.limits.settled.values()) == (set() if step.name == "authenticating" else {1})


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("http2", [False, True], ids=["http/1.1", "http/2"])
# Nobody watches the connection while it authenticates, so there the moment at which the gateway
# learns of it depends on nginx.
@pytest.mark.parametrize("step", STEPS[1:], ids=lambda step: step.name)
async def test_client_of_nginx_goes_away(step: Step, http2: bool, stream: bool) -> None:
    async with world(step.speed, replicas=step.replicas) as served, behind_nginx(served) as url:
        step.hold(served)
        async with calling(
            served, TEXT, stream=stream, max_tokens=step.max_tokens, url=url, http2=http2
        ) as caller:
            await step.reached(served)
            await caller.disconnect()
            await _check(step, served, caller)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_what_was_generated_until_then_is_recorded(stream: bool) -> None:
    async with world(SLOW) as served:
        async with calling(served, TEXT, stream=stream, max_tokens=2000) as caller:
            await _generating(served)
            await caller.disconnect()
            row = await served.the_record()
        words = [f"w{index}" for index in range(row.completion_tokens)]
        assert (row.response_text or "").split() == words
        assert row.finish_reason == "abort"
        assert row.prompt_tokens == 3


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_engine_stops_within_a_second(stream: bool) -> None:
    async with (
        world(SLOW) as served,
        calling(served, TEXT, stream=stream, max_tokens=2000) as caller,
    ):
        await _generating(served)
        await caller.disconnect()
        async with asyncio.timeout(1):
            await until(lambda: served.replica.counters.requests_running == 0)
        await served.quiet()


async def test_engine_that_stalls_is_stopped_too() -> None:
    # It does not take the abort: the lease ends, and the door cancels what runs.
    async with world(SLOW_START) as served:
        served.replica.engine.abort = lambda request_id: None  # type: ignore[method-assign]
        async with calling(served, TEXT, stream=True, max_tokens=5) as caller:
            await _running(served)
            await caller.disconnect()
            row = await served.the_record()
        assert (row.outcome, row.completion_tokens) == (Outcome.CANCELLED, 0)


async def test_engine_that_fails_while_the_client_goes_away() -> None:
    answering, fail = asyncio.Event(), asyncio.Event()

    async def answer(request: Request) -> Response:
        await request.body()
        answering.set()
        await fail.wait()
        return PlainTextResponse("Internal Server Error", 500)

    app = Starlette(routes=[Route("/{path:path}", answer, methods=["POST"])])
    async with world(engine_app=app) as served:
        served.replica.engine.abort = lambda request_id: fail.set()  # type: ignore[method-assign]
        async with calling(served, TEXT, stream=False, max_tokens=5) as caller:
            await answering.wait()
            await caller.disconnect()
            assert (await served.the_record()).outcome is Outcome.CANCELLED


async def test_handler_that_is_cancelled_twice_still_finishes() -> None:
    async with world() as served:
        served.log.gate.shut()
        async with calling(served, TEXT, stream=True, max_tokens=5):
            await served.log.gate.reached()
            for _ in range(3):
                served.app.cancel()
                await asyncio.sleep(0)
            await until(lambda: not served.app.busy)
            assert not served.records
            closing = asyncio.create_task(served.gateway.close())
            await asyncio.sleep(0)
            assert not closing.done()
            served.log.gate.open()
            await closing
            assert (await served.the_record()).outcome is Outcome.COMPLETED


async def test_log_that_fails_while_the_client_goes_away_holds_nothing() -> None:
    async with world(SLOW, record_timeout_s=0.1) as served:
        served.log.gate.shut()
        async with calling(served, TEXT, stream=True, max_tokens=2000) as caller:
            await _generating(served)
            await caller.disconnect()
            await until(lambda: not served.app.busy)
        assert served.limits.held("user-1") == 0
        await until(lambda: served.replica.counters.live_leases == 0)
        assert served.replica.counters.requests_running == 0


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_client_goes_away_while_it_sends_its_body(stream: bool) -> None:
    async with world() as served:
        host, _, port = served.server.address.partition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        head = (
            f"POST {TEXT} HTTP/1.1\r\nhost: x\r\nauthorization: {AUTHORIZATION['authorization']}"
            "\r\ncontent-length: 1000\r\n\r\n"
        )
        writer.write(head.encode() + b'{"model": "small"')
        await writer.drain()
        await until(lambda: served.app.busy)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        row = await served.the_record()
        assert (row.outcome, row.model, row.principal_id) == (Outcome.CANCELLED, None, "user-1")


async def test_usage_that_is_told_late_is_not_lost() -> None:
    """As on a busy machine: the replica agrees to end the answer, and is slow to do it."""
    async with world(SLOW) as served:
        abort, loop = served.replica.engine.abort, asyncio.get_running_loop()
        served.replica.engine.abort = lambda one: loop.call_later(1, abort, one)  # type: ignore
        async with calling(served, CHAT, stream=True, max_tokens=2000) as caller:
            await _generating(served)
            await caller.disconnect()
            row = await served.the_record()
    assert (row.outcome, row.prompt_tokens) == (Outcome.CANCELLED, 3)
    served.assert_accounts_add_up()


async def test_many_clients_go_away_at_random_moments() -> None:
    speed = FakeEngineConfig(time_to_first_token_s=0.01, time_per_token_s=0.002)
    async with world(speed) as served, contextlib.AsyncExitStack() as stack:
        callers = [
            await stack.enter_async_context(
                calling(served, (CHAT, TEXT)[n % 2], stream=n % 3 > 0, max_tokens=1 + n)
            )
            for n in range(40)
        ]
        for number, caller in enumerate(callers):
            await asyncio.sleep(0.001 * (number % 5))
            await caller.disconnect()
        # Connections are taken in their order: when this one is answered, the app has seen every
        # request that came out. Who went away before that leaves none.
        async with calling(served, TEXT, stream=False, max_tokens=1) as last:
            await last.answered()
        await until(lambda: not served.app.busy)
        await served.quiet(records=len(served.records))
        assert served.records
        served.assert_accounts_add_up()


class Http2:
    """One HTTP/2 connection; httpx closes the connection where a stream shall be reset."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._h2 = H2Connection()
        self._h2.initiate_connection()
        self.received: dict[int, bytes] = defaultdict(bytes)
        self._receiving = asyncio.create_task(self._receive())

    def ask(self, body: dict[str, Any]) -> int:
        """Send a request; return the number of its stream."""
        number = self._h2.get_next_available_stream_id()
        head = [(":method", "POST"), (":scheme", "http"), (":authority", "x"), (":path", TEXT)]
        self._h2.send_headers(number, [*head, *AUTHORIZATION.items()])
        self._h2.send_data(number, json.dumps(body).encode(), end_stream=True)
        self._flush()
        return number

    def reset(self, number: int) -> None:
        """Give up one stream."""
        self._h2.reset_stream(number)
        self._flush()

    async def close(self) -> None:
        """Close the connection."""
        self._receiving.cancel()
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _receive(self) -> None:
        while data := await self._reader.read(65536):
            for event in self._h2.receive_data(data):
                if isinstance(event, DataReceived) and event.stream_id is not None:
                    self.received[event.stream_id] += event.data or b""
                    size = event.flow_controlled_length or 0
                    self._h2.acknowledge_received_data(size, event.stream_id)
            self._flush()

    def _flush(self) -> None:
        self._writer.write(self._h2.data_to_send())


async def test_one_stream_of_a_connection_is_reset() -> None:
    async with world(SLOW) as served, behind_nginx(served) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        connection = Http2(*await asyncio.open_connection(host, int(port)))
        body = {"model": "small", "prompt": "one two three", "stream": True}
        try:
            long = connection.ask({**body, "max_tokens": 2000})
            await _generating(served)
            for other in (connection.ask({**body, "max_tokens": 3}) for _ in range(2)):
                await until(lambda n=other: connection.received[n].endswith(b"[DONE]\n\n"))  # type: ignore[misc]
            assert served.replica.counters.requests_running == 1
            connection.reset(long)
            # The connection stays.
            await served.quiet(records=3)
            again = connection.ask({**body, "max_tokens": 3})
            await until(lambda: connection.received[again].endswith(b"[DONE]\n\n"))
        finally:
            await connection.close()
        await served.quiet(records=4)
        assert [row.outcome for row in served.records] == [
            Outcome.COMPLETED,
            Outcome.COMPLETED,
            Outcome.CANCELLED,
            Outcome.COMPLETED,
        ]
        served.assert_accounts_add_up()
