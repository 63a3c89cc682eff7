"""A replica that fails before its answer: the request is asked again elsewhere, once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import orjson
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from serve_app.fake_engine import ConnectionDropped
from serve_app.records import Outcome
from tests.integration.fakes import World, client, parse_events, until, world

TEXT = "/v1/completions"


def body(**more: Any) -> dict[str, Any]:
    """Return a request."""
    return {"model": "small", "prompt": "one two three", "max_tokens": 5, **more}


class Failing:
    """An engine that fails in one way, and counts how often it was asked."""

    def __init__(self, fail: Callable[[Request], Response]) -> None:
        self.asked = 0
        self._fail = fail

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        self.asked += 1
        request = Request(scope, receive)
        await request.body()
        await self._fail(request)(scope, receive, send)


def _server_error(_: Request) -> Response:
    return JSONResponse({"error": {"message": "out of memory"}}, 500)


def _restarting(_: Request) -> Response:
    return Response("Service Unavailable", 503)


def _lease_lost(_: Request) -> Response:
    return JSONResponse({"error": {"message": "no live lease"}}, 403)


def _dropped(_: Request) -> Response:
    raise ConnectionDropped


def _cut(_: Request) -> Response:
    async def parts() -> AsyncIterator[bytes]:
        yield b'data: {"choi'
        raise ConnectionDropped

    return StreamingResponse(parts(), media_type="text/event-stream")


def _error_frame(_: Request) -> Response:
    frame = {"error": {"message": "engine is dead", "code": 500}}
    content = b"data: " + orjson.dumps(frame) + b"\n\ndata: [DONE]\n\n"
    return Response(content, media_type="text/event-stream")


def _without_end(_: Request) -> Response:
    return Response(b": hello\n\n"[:3], media_type="text/event-stream")


FAILURES = [_server_error, _restarting, _lease_lost, _dropped, _cut]
IN_STREAMS = [_error_frame, _without_end]


@pytest.mark.parametrize(
    ("fail", "stream"),
    [(fail, stream) for fail in FAILURES for stream in (True, False)]
    + [(fail, True) for fail in IN_STREAMS],
)
async def test_another_replica_answers(fail: Callable[[Request], Response], stream: bool) -> None:
    broken = Failing(fail)
    async with world(engine_app=broken, replicas=2) as served, client(served) as http:
        response = await http.post(TEXT, json=body(stream=stream))
        assert response.status_code == 200
        assert "w0" in response.text
        assert response.text.endswith("data: [DONE]\n\n") is stream
        row = await served.the_record()
        assert (row.outcome, row.replica_id) == (Outcome.COMPLETED, "replica-2")
        assert (row.prompt_tokens, row.completion_tokens) == (3, 5)
        assert row.response_text == "w0 w1 w2 w3 w4 "
        assert broken.asked == 1
        assert [hint.avoid for hint in served.pool.hints][:2] == [None, "replica-1"]
        # Both waits are in it.
        assert "queue;dur=" in response.headers["server-timing"]
        served.assert_accounts_add_up()


@pytest.mark.parametrize("stream", [True, False])
async def test_replica_that_does_not_listen(stream: bool) -> None:
    async with world(replicas=2) as served, client(served) as http:
        served.replica.server.address = "127.0.0.1:9"  # discard: nobody listens
        response = await http.post(TEXT, json=body(stream=stream))
        assert response.status_code == 200
        assert (await served.the_record()).replica_id == "replica-2"


async def test_pool_that_knows_no_other_replica_is_asked_no_more_than_a_few_times() -> None:
    broken = Failing(_server_error)
    async with world(engine_app=broken) as served, client(served) as http:
        response = await http.post(TEXT, json=body())
        assert response.status_code == 502
        assert response.json()["error"]["code"] == "engine_error"
        assert (await served.the_record()).outcome is Outcome.FAILED
        assert broken.asked == 1
        assert len(served.pool.hints) == 5


async def test_second_failure_is_the_last() -> None:
    broken = Failing(_server_error)
    async with world(engine_app=broken, replicas=3) as served, client(served) as http:
        for replica in served.replicas[1:]:
            replica.server.address = "127.0.0.1:9"
        response = await http.post(TEXT, json=body())
        assert response.status_code == 502
        assert (await served.the_record()).replica_id == "replica-2"
        assert broken.asked == 1


async def test_what_the_engine_refuses_is_not_asked_again() -> None:
    async with world(replicas=2) as served, client(served) as http:
        response = await http.post(TEXT, json=body(prompt="[[error=400]]"))
        assert response.status_code == 400
        assert (await served.the_record()).replica_id == "replica-1"
        assert len(served.pool.hints) == 1


async def test_answer_that_has_begun_is_not_asked_again() -> None:
    async with world(replicas=2) as served, client(served) as http:
        response = await http.post(TEXT, json=body(prompt="[[drop_after=2]]", stream=True))
        *_, last = parse_events(response.text)
        assert last["error"]["code"] == "engine_error"
        row = await served.the_record()
        assert (row.replica_id, row.completion_tokens) == ("replica-1", 2)
        assert len(served.pool.hints) == 1


async def test_stream_that_only_a_comment_has_opened_is_asked_again() -> None:
    silent = asyncio.Event()

    def fail(_: Request) -> Response:
        async def parts() -> AsyncIterator[bytes]:
            await silent.wait()
            raise ConnectionDropped
            yield b""

        return StreamingResponse(parts(), media_type="text/event-stream")

    async with (
        world(engine_app=Failing(fail), replicas=2, keep_alive_s=0.02) as served,
        client(served) as http,
        http.stream("POST", TEXT, json=body(stream=True)) as response,
    ):
        silent.set()
        text = "".join([part async for part in response.aiter_text()])
        assert text.startswith(": keep-alive")
        assert text.endswith("data: [DONE]\n\n")
        assert (await served.the_record()).completion_tokens == 5


async def test_deadline_holds_for_both_together() -> None:
    broken = Failing(_server_error)
    async with world(engine_app=broken, replicas=2, deadline_s=0.5) as served:
        served.replicas[1].engine.abort = lambda request_id: None  # type: ignore[method-assign]
        async with client(served) as http:
            response = await http.post(TEXT, json=body(prompt="[[stall_after=0]]"))
            assert response.status_code == 504
            assert (await served.the_record()).outcome is Outcome.TIMED_OUT
            assert len(served.pool.hints) >= 2


async def _gone_while(served: World, http: httpx.AsyncClient, ready: Callable[[], bool]) -> None:
    asking = asyncio.create_task(http.post(TEXT, json=body(stream=True)))
    await until(ready)
    asking.cancel()
    await asyncio.wait([asking])
    row = await served.the_record()
    assert (row.outcome, row.status) == (Outcome.CANCELLED, 499)


async def test_client_that_goes_away_while_another_replica_is_sought() -> None:
    def fail(_: Request) -> Response:
        served.pool.gate.shut()
        return _server_error(_)

    async with world(engine_app=Failing(fail), replicas=2) as served, client(served) as http:
        await _gone_while(served, http, lambda: served.pool.gate.waiting > 0)
        assert len(served.pool.hints) >= 2


async def test_client_that_goes_away_while_the_first_is_stopped() -> None:
    stopping = asyncio.Event()

    class Stuck:
        """An error first, then nothing; and the abort is not answered."""

        def __init__(self) -> None:
            self.gone = False

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            frame = b'data: {"error": {"message": "dead", "code": 500}}\n\n'
            await send({"type": "http.response.body", "body": frame, "more_body": True})
            try:
                await asyncio.Event().wait()
            finally:
                self.gone = True

    stuck = Stuck()
    async with world(engine_app=stuck, replicas=2) as served, client(served) as http:
        served.replica.engine.abort = lambda request_id: stopping.set()  # type: ignore[method-assign]
        await _gone_while(served, http, stopping.is_set)
        await until(lambda: stuck.gone)
        assert len(served.pool.hints) == 1


async def test_many_requests_and_one_bad_replica(caplog: pytest.LogCaptureFixture) -> None:
    broken = Failing(_dropped)
    async with world(engine_app=broken, replicas=3) as served, client(served) as http:
        answers = await asyncio.gather(
            *(http.post(TEXT, json=body(stream=n % 2 == 0)) for n in range(30))
        )
        assert {answer.status_code for answer in answers} == {200}
        assert broken.asked > 0
        await served.quiet(records=30)
        served.assert_accounts_add_up()
        assert "asking another" in caplog.text
