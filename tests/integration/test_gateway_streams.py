"""Streams: every byte as the engine sent it, comments in silence, readers that do not read."""

from __future__ import annotations

import asyncio
import gc
import pickle
import socket
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.completions.call import Call
from serve_app.completions.patience import Patience
from serve_app.fake_engine import FakeEngineConfig
from serve_app.records import Outcome
from tests.integration.fakes import (
    AUTHORIZATION,
    FAST,
    World,
    client,
    parse_events,
    until,
    world,
)

TEXT = "/v1/completions"
COMMENT = b": keep-alive\n\n"


def body(**more: Any) -> dict[str, Any]:
    """Return a request for a stream."""
    return {"model": "small", "prompt": "one", "max_tokens": 5, "stream": True, **more}


class Reader:
    """A client that reads a stream in the background."""

    def __init__(self, http: httpx.AsyncClient, **more: Any) -> None:
        self.received = bytearray()
        self.status: int | None = None
        self._http = http
        self._body = body(**more)
        self.reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async with self._http.stream("POST", TEXT, json=self._body) as response:
            self.status = response.status_code
            async for part in response.aiter_raw():
                self.received += part


# Silence.


async def test_comments_fill_the_silence_between_tokens() -> None:
    async with world(keep_alive_s=0.02) as served, client(served) as http:
        reader = Reader(http, prompt="[[stall_after=2]]")
        await until(lambda: reader.received.count(COMMENT) >= 3)
        reader.reading.cancel()
        row = await served.the_record()
    frames, _, _ = bytes(reader.received).partition(COMMENT)
    assert [event["choices"][0]["text"] for event in parse_events(frames.decode())] == [
        "w0 ",
        "w1 ",
    ]
    # A comment is no part of the answer.
    assert (row.completion_tokens, row.response_text) == (2, "w0 w1 ")


async def test_comments_open_the_stream_once_the_engine_has_taken_the_request() -> None:
    speed = FakeEngineConfig(time_to_first_token_s=3600, time_per_token_s=0)
    async with world(speed, keep_alive_s=0.02) as served, client(served) as http:
        served.pool.gate.shut()
        reader = Reader(http)
        await served.pool.gate.reached()
        # It waits for a replica: its status is not settled yet, so nothing may be said.
        for _ in range(5):
            await asyncio.sleep(0.02)
        assert served.events == []
        served.pool.gate.open()
        await until(lambda: reader.received.count(COMMENT) >= 2)
        assert reader.status == 200
        reader.reading.cancel()
        row = await served.the_record()
        assert (row.outcome, row.completion_tokens) == (Outcome.CANCELLED, 0)


@pytest.mark.parametrize("leaves", [False, True])
async def test_stream_that_has_ended_is_freed_without_the_collector(leaves: bool) -> None:
    """What waits for it is the memory of a gateway: all of a request, for hundreds of them."""
    gc.collect()
    # Of tests before: an error that is a parameter of one keeps where it was raised.
    others = _held()
    gc.disable()
    try:
        async with world() as served, client(served) as http:
            reader = Reader(http, **({"prompt": "[[stall_after=2]]"} if leaves else {}))
            await until(lambda: b"w1 " in reader.received)
            if leaves:
                reader.reading.cancel()
            await served.the_record()
            await asyncio.wait([reader.reading])
            await until(lambda: len(_held()) == len(others))
    finally:
        gc.enable()


def _held() -> list[object]:
    return [one for one in gc.get_objects() if type(one) in (Call, Patience)]


async def test_comments_go_on_while_the_record_is_written() -> None:
    async with world(keep_alive_s=0.02) as served, client(served) as http:
        served.log.gate.shut()
        reader = Reader(http)
        await served.log.gate.reached()
        await until(lambda: reader.received.count(COMMENT) >= 2)
        served.log.gate.open()
        await reader.reading
    assert reader.received.endswith(b"data: [DONE]\n\n")
    assert (await served.the_record()).outcome is Outcome.COMPLETED


async def test_error_after_a_comment_ends_the_stream() -> None:
    async with world(keep_alive_s=0.02, deadline_s=0.5) as served, client(served) as http:
        reader = Reader(http, prompt="[[stall_after=0]]")
        await reader.reading
        assert reader.status == 200
        assert reader.received.startswith(COMMENT)
        frame = bytes(reader.received).rpartition(COMMENT)[2].decode()
        (error,) = parse_events(frame)
        assert error["error"]["code"] == "deadline_exceeded"
        row = await served.the_record()
        assert (row.outcome, row.status) == (Outcome.TIMED_OUT, 504)


async def test_whole_answer_gets_no_comments() -> None:
    speed = FakeEngineConfig(time_to_first_token_s=0.2, time_per_token_s=0)
    async with world(speed, keep_alive_s=0.02) as served, client(served) as http:
        response = await http.post(TEXT, json=body(stream=False))
        assert response.json()["usage"]["completion_tokens"] == 5


# Timings at the end.


@pytest.mark.parametrize("failing", [False, True])
async def test_timings_stand_at_the_end_where_they_are_asked_for(failing: bool) -> None:
    prompt = "[[drop_after=2]]" if failing else "one"
    headers = {"x-comp-ai-server-timing": "trailer"}
    async with world() as served, client(served) as http:
        response = await http.post(TEXT, json=body(prompt=prompt), headers=headers)
        *_, timing, last, end = response.text.split("\n\n")
        assert end == ""
        assert last.startswith('data: {"error"' if failing else "data: [DONE]")
        assert timing.startswith(": server-timing: auth;dur=")
        steps = [step.split(";")[0] for step in timing.partition("timing: ")[2].split(", ")]
        assert steps == ["auth", "limits", "queue", "ttft", "total"]


async def test_timings_are_not_in_a_stream_unasked() -> None:
    async with world() as served, client(served) as http:
        assert ": server-timing" not in (await http.post(TEXT, json=body())).text


# Readers that do not read.

_FRAME = b'data: {"choices":[{"index":0,"text":"' + b"x" * 10_000 + b'"}]}\n\n'


class Flood:
    """An engine that sends as fast as it is read, without end, and knows when it was stopped."""

    def __init__(self) -> None:
        self.sent_bytes = 0
        self.stopped = False
        self._aborted = False

    def abort(self, _request_id: str) -> None:
        """End the answer."""
        self._aborted = True

    def app(self) -> ASGIApp:
        async def answer(request: Request) -> StreamingResponse:
            await request.body()
            return StreamingResponse(self._frames(), media_type="text/event-stream")

        return Starlette(routes=[Route("/{path:path}", answer, methods=["POST"])])

    async def _frames(self) -> AsyncIterator[bytes]:
        try:
            while not self._aborted:
                self.sent_bytes += len(_FRAME)
                yield _FRAME
                await asyncio.sleep(0)
        finally:
            self.stopped = True


class AsServe:
    """Takes messages as Serve's replica does: at once, on a queue without a bound.

    What stands on the other end passes them on as pickles, as fast as the client takes them.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._queue: deque[Message] = deque()
        self._more = asyncio.Event()

    @property
    def held_bytes(self) -> int:
        """What waits on the queue, without the batch that is passed on."""
        return sum(len(message.get("body", b"")) for message in self._queue)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        passing_on = asyncio.create_task(self._pass_on(send))

        complete = False

        async def enqueue(message: Message) -> None:
            nonlocal complete
            complete = message["type"] != "http.response.start" and not message.get("more_body")
            self._queue.append(message)
            self._more.set()

        try:
            await self._app(scope, receive, enqueue)
            if complete:
                await passing_on
        finally:
            passing_on.cancel()

    async def _pass_on(self, send: Send) -> None:
        more = True
        batch: list[Message] = []
        while more:
            # The last batch is kept meanwhile, as Serve does.
            await self._more.wait()
            self._more.clear()
            batch = list(self._queue)
            self._queue.clear()
            for message in pickle.loads(pickle.dumps(batch)):
                more = message["type"] == "http.response.start" or message["more_body"]
                await send(message)


@asynccontextmanager
async def not_reading(served: World) -> AsyncIterator[socket.socket]:
    """Ask for a stream and read nothing of it."""
    host, _, port = served.server.address.partition(":")
    payload = httpx.Request("POST", served.url + TEXT, json=body(), headers=AUTHORIZATION)
    head = "".join(f"{name}: {value}\r\n" for name, value in payload.headers.items())
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((host, int(port)))
    try:
        connection.sendall(f"POST {TEXT} HTTP/1.1\r\n{head}\r\n".encode() + payload.content)
        yield connection
    finally:
        connection.close()


@pytest.mark.parametrize("as_serve", [True, False], ids=["Serve's queue", "a server that waits"])
async def test_client_that_does_not_read_is_cut_off(as_serve: bool) -> None:
    flood = Flood()
    async with world(FAST, flood.app(), client_write_timeout_s=0.3) as served:
        served.replica.engine.abort = flood.abort  # type: ignore[method-assign]
        queue = AsServe(served.app.inner)
        if as_serve:
            served.app.inner = queue
        async with not_reading(served):
            row = await served.the_record()
            assert (row.outcome, row.status) == (Outcome.CANCELLED, 499)
            assert row.error_code == "client_too_slow"
            await until(lambda: flood.stopped)
            assert queue.held_bytes < 300_000
    # The sockets of both connections hold some megabytes; what it sent does not grow for ever.
    assert 0 < flood.sent_bytes < 20_000_000


async def test_client_that_reads_in_its_own_time_is_not_cut_off() -> None:
    tokens = 2000
    async with world(FAST, client_write_timeout_s=5, bodies="none") as served:
        served.app.inner = AsServe(served.app.inner)
        async with (
            client(served) as http,
            http.stream("POST", TEXT, json=body(max_tokens=tokens)) as response,
        ):
            text = b""
            async for part in response.aiter_raw(64 * 1024):
                await asyncio.sleep(0.01)
                text += part
        assert text.count(b'"text":"w') == tokens
        assert (await served.the_record()).outcome is Outcome.COMPLETED


async def test_large_frames_pass_where_the_last_are_kept() -> None:
    frame = b'data: {"choices":[{"index":0,"text":"' + b"x" * 400_000 + b'"}]}\n\n'
    frames = [frame] * 10 + [b"data: [DONE]\n\n"]

    async def answer(request: Request) -> StreamingResponse:
        await request.body()

        async def parts() -> AsyncIterator[bytes]:
            for part in frames:
                yield part

        return StreamingResponse(parts(), media_type="text/event-stream")

    app = Starlette(routes=[Route("/{path:path}", answer, methods=["POST"])])
    async with world(FAST, app, client_write_timeout_s=5) as served, client(served) as http:
        served.app.inner = AsServe(served.app.inner)
        assert (await http.post(TEXT, json=body())).content == b"".join(frames)
        assert (await served.the_record()).outcome is Outcome.COMPLETED


async def test_last_byte_that_nobody_takes_is_given_up() -> None:
    class Stuck:
        """Lets everything pass but the last message."""

        def __init__(self, app: ASGIApp) -> None:
            self._app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            async def stuck(message: Message) -> None:
                if message["type"] != "http.response.start" and not message.get("more_body"):
                    await asyncio.Event().wait()
                await send(message)

            await self._app(scope, receive, stuck)

    async with world(client_write_timeout_s=0.1) as served, client(served) as http:
        served.app.inner = Stuck(served.app.inner)
        for more in ({}, {"stream": False}, {"model": "absent"}):
            with pytest.raises(httpx.RemoteProtocolError):
                await http.post(TEXT, json=body(**more))
        await until(lambda: not served.app.busy)
        assert [row.status for row in served.records] == [200, 200, 404]


# Bytes.

_WHOLE = (
    b": hello\n\n"
    b'data: {"choices": [ {"index":0, "text":"data: [DONE] \\"usage\\":{ \xc3\xa9"} ]}\n\n'
    b'data: {"choices":[{"index":0,"text":"","finish_reason":"stop"}]}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":7}}\n\n'
    b"data: [DONE]\n\n"
)


@pytest.mark.parametrize("cut", range(1, len(_WHOLE), 7))
async def test_every_byte_passes_wherever_the_engine_cuts(cut: int) -> None:
    async def answer(request: Request) -> StreamingResponse:
        await request.body()

        async def halves() -> AsyncIterator[bytes]:
            yield _WHOLE[:cut]
            # So that it goes out by itself.
            await asyncio.sleep(0.001)
            yield _WHOLE[cut:]

        return StreamingResponse(halves(), media_type="text/event-stream")

    app = Starlette(routes=[Route("/{path:path}", answer, methods=["POST"])])
    async with world(engine_app=app) as served, client(served) as http:
        asked = {"stream_options": {"include_usage": True}}
        assert (await http.post(TEXT, json=body(**asked))).content == _WHOLE
        unasked = (await http.post(TEXT, json=body())).content
        assert unasked == b"\n\n".join(
            frame for frame in _WHOLE.split(b"\n\n") if b'"usage":{"prompt' not in frame
        )
        await served.quiet(records=2)
        assert [row.completion_tokens for row in served.records] == [7, 7]
