"""The gateway over real HTTP, in front of real replicas with a fake engine."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import openai
import orjson
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from serve_app.errors import (
    EngineFailed,
    IdentityUnavailable,
    LimitsUnavailable,
    LogUnavailable,
    ModelNotReady,
    ModelOverloaded,
    RequestError,
)
from serve_app.records import Outcome, RequestRecord
from tests.integration.fakes import (
    AUTHORIZATION,
    KEY,
    World,
    client,
    parse_events,
    principal,
    until,
    world,
)

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
ROUTES = {CHAT: "chat.completions", TEXT: "completions"}


def ask(path: str, text: str = "one two three", **more: Any) -> dict[str, Any]:
    """Return a body for `path`."""
    body: dict[str, Any] = {"model": "small", "max_tokens": 5, **more}
    if path == CHAT:
        return {**body, "messages": [{"role": "user", "content": text}]}
    return {**body, "prompt": text}


def text_of(answer: dict[str, Any]) -> str:
    """Return the text of an answer or a chunk."""
    choice = answer["choices"][0]
    part = choice.get("message") or choice.get("delta") or {}
    return str(part.get("content") or choice.get("text") or "")


@pytest.fixture
async def served() -> AsyncIterator[World]:
    """A gateway that is as fast as it can be."""
    async with world() as made:
        yield made


@pytest.fixture
async def http(served: World) -> AsyncIterator[httpx.AsyncClient]:
    """A client that is signed in at `served`."""
    async with client(served) as made:
        yield made


# Answers.


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_whole_answer(served: World, http: httpx.AsyncClient, path: str) -> None:
    response = await http.post(path, json=ask(path))
    assert response.status_code == 200
    answer = response.json()
    assert text_of(answer) == "w0 w1 w2 w3 w4 "
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    row = await served.the_record()
    assert (row.outcome, row.status, row.route) == (Outcome.COMPLETED, 200, ROUTES[path])
    assert (row.principal_id, row.model, row.replica_id) == ("user-1", "small", "replica-1")
    assert (row.prompt_tokens, row.completion_tokens, row.finish_reason) == (3, 5, "length")
    assert (row.stream, row.response_text) == (False, "w0 w1 w2 w3 w4 ")
    assert orjson.loads(row.request_body or "") == ask(path)
    served.assert_accounts_add_up()


@pytest.mark.parametrize("wants_usage", [True, False])
@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_stream(served: World, http: httpx.AsyncClient, path: str, wants_usage: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if wants_usage else {}
    response = await http.post(path, json=ask(path, stream=True, **options))
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-accel-buffering"] == "no"
    *chunks, done = parse_events(response.text)
    assert done == "[DONE]"
    usages = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    assert len(usages) == wants_usage
    assert "".join(text_of(chunk) for chunk in chunks if chunk["choices"]) == "w0 w1 w2 w3 w4 "
    row = await served.the_record()
    assert (row.outcome, row.stream, row.finish_reason) == (Outcome.COMPLETED, True, "length")
    assert (row.prompt_tokens, row.completion_tokens) == (3, 5)
    assert row.response_text == "w0 w1 w2 w3 w4 "
    assert row.inter_token_mean_ms is not None
    assert row.time_to_first_token_ms is not None
    served.assert_accounts_add_up()


async def test_openai_client(served: World) -> None:
    async with openai.AsyncOpenAI(api_key=KEY, base_url=f"{served.url}/v1") as api:
        chat = await api.chat.completions.create(
            model="small", messages=[{"role": "user", "content": "Hi"}], max_tokens=3
        )
        assert chat.choices[0].message.content == "w0 w1 w2 "
        assert chat.usage is not None
        assert chat.usage.completion_tokens == 3
        text = await api.completions.create(model="small", prompt="Hi", max_tokens=2)
        assert text.choices[0].text == "w0 w1 "
        assert [model.id async for model in api.models.list()] == ["small"]
        assert (await api.models.retrieve("small")).id == "small"
    await served.quiet(records=4)


async def test_openai_client_streams(served: World) -> None:
    async with openai.AsyncOpenAI(api_key=KEY, base_url=f"{served.url}/v1") as api:
        chat = await api.chat.completions.create(
            model="small",
            messages=[{"role": "user", "content": "Hi"}],
            max_tokens=3,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in chat]
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "w0 w1 w2 "
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 3
        text = await api.completions.create(model="small", prompt="Hi", max_tokens=2, stream=True)
        assert "".join([chunk.choices[0].text async for chunk in text]) == "w0 w1 "
    await served.quiet(records=2)


async def test_openai_client_raises_its_own_errors(served: World) -> None:
    url = f"{served.url}/v1"
    async with openai.AsyncOpenAI(api_key="wrong", base_url=url, max_retries=0) as api:
        with pytest.raises(openai.AuthenticationError):
            await api.completions.create(model="small", prompt="Hi")
    async with openai.AsyncOpenAI(api_key=KEY, base_url=url, max_retries=0) as api:
        with pytest.raises(openai.NotFoundError, match="does not exist") as missing:
            await api.completions.create(model="absent", prompt="Hi")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError, match="max_tokens"):
            await api.completions.create(model="small", prompt="Hi", max_tokens=-1)
        with pytest.raises(openai.APIError, match="The model failed"):
            async for _ in await api.completions.create(
                model="small", prompt="[[drop_after=2]]", stream=True
            ):
                pass
    await served.quiet(records=4)


async def test_server_timing_tells_every_step(served: World, http: httpx.AsyncClient) -> None:
    for stream in (True, False):
        response = await http.post(TEXT, json=ask(TEXT, stream=stream))
        steps = [part.split(";")[0] for part in response.headers["server-timing"].split(", ")]
        # A stream's head goes out with its first token, when the total is not known.
        assert steps == ["auth", "limits", "queue", "ttft", *([] if stream else ["total"])]


async def test_same_request_id_gives_two_records(served: World, http: httpx.AsyncClient) -> None:
    headers = {"x-request-id": "mine"}
    answers = await asyncio.gather(
        *(http.post(TEXT, json=ask(TEXT), headers=headers) for _ in range(2))
    )
    assert [answer.status_code for answer in answers] == [200, 200]
    await served.quiet(records=2)
    assert [row.request_id for row in served.records] == ["mine", "mine"]
    assert len({row.id for row in served.records}) == 2


async def test_many_at_once(served: World, http: httpx.AsyncClient) -> None:
    bodies = [ask(TEXT, stream=number % 2 == 0, max_tokens=1 + number) for number in range(30)]
    answers = await asyncio.gather(*(http.post(TEXT, json=body) for body in bodies))
    assert {answer.status_code for answer in answers} == {200}
    await served.quiet(records=30)
    served.assert_accounts_add_up()


async def test_nothing_is_kept_of_bodies_where_the_policy_says_so() -> None:
    async with world(bodies="none") as served, client(served) as http:
        await http.post(TEXT, json=ask(TEXT))
        await http.post(TEXT, json=ask(TEXT, stream=True))
        await served.quiet(records=2)
        assert {(r.request_body, r.response_text) for r in served.records} == {(None, None)}
        served.assert_accounts_add_up()


async def test_models_that_a_caller_may_not_use_are_not_shown(served: World) -> None:
    served.authenticator.principals["other"] = principal("user-2", models=frozenset({"big"}))
    async with client(served) as http:
        headers = {"authorization": "Bearer other"}
        assert (await http.get("/v1/models", headers=headers)).json()["data"] == []
        assert (await http.get("/v1/models/small", headers=headers)).status_code == 404
        assert (await http.post(TEXT, json=ask(TEXT), headers=headers)).status_code == 404
    await served.quiet(records=3)


async def test_ready_follows_the_model(served: World, http: httpx.AsyncClient) -> None:
    assert (await http.get("/ready")).status_code == 200
    served.pool.error = ModelNotReady()
    assert (await http.get("/ready")).status_code == 503


# Refusals: an OpenAI error object, and exactly one record.


async def refused(served: World, response: httpx.Response, status: int, code: str) -> Any:
    """Check one refusal, and return its error object."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert "total;dur=" in response.headers["server-timing"]
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert error["message"]
    row = await served.the_record()
    assert (row.status, row.error_code) == (status, code)
    return error


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": NaN}', b"\xff"])
async def test_bad_json(served: World, http: httpx.AsyncClient, content: bytes) -> None:
    await refused(served, await http.post(CHAT, content=content), 400, "invalid_json")
    assert served.records[0].outcome is Outcome.REFUSED
    assert served.records[0].principal_id == "user-1"


@pytest.mark.parametrize(
    ("more", "param", "code"),
    [
        ({"max_tokens": -1}, "max_tokens", "invalid_value"),
        ({"max_tokens": 2001}, "max_tokens", "invalid_value"),
        ({"model": None}, "model", "invalid_value"),
        ({"best_of": 2}, "best_of", "unsupported_parameter"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_wrong_parameter(
    served: World, http: httpx.AsyncClient, path: str, more: dict[str, Any], param: str, code: str
) -> None:
    response = await http.post(path, json=ask(path, **more))
    error = await refused(served, response, 400, code)
    assert error["param"] == param
    assert served.replica.counters.completion_tokens == 0


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}])
@pytest.mark.parametrize(("method", "path"), [("POST", CHAT), ("GET", "/v1/models")])
async def test_wrong_key(served: World, headers: dict[str, str], method: str, path: str) -> None:
    async with httpx.AsyncClient(base_url=served.url) as http:
        response = await http.request(method, path, headers=headers, json=ask(CHAT))
    await refused(served, response, 401, "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"
    assert served.records[0].principal_id is None
    assert "wrong" not in served.lines.getvalue()


async def test_missing_permission(served: World, http: httpx.AsyncClient) -> None:
    served.authenticator.principals[KEY] = principal("user-1", permissions=frozenset())
    response = await http.post(CHAT, json=ask(CHAT))
    error = await refused(served, response, 403, "permission_denied")
    assert "comp-ai:user" in error["message"]


async def test_unknown_model(served: World, http: httpx.AsyncClient) -> None:
    response = await http.post(CHAT, json=ask(CHAT, model="absent"))
    await refused(served, response, 404, "model_not_found")
    line = orjson.loads(served.lines.getvalue())
    assert line["model"] == "(other)"  # what a client makes up is no label


@pytest.mark.parametrize("headers", [{}, AUTHORIZATION])
async def test_unknown_path(served: World, headers: dict[str, str]) -> None:
    async with httpx.AsyncClient(base_url=served.url, headers=headers) as http:
        response = await http.post("/v1/images", json={})
    await refused(served, response, 404, "not_found")
    assert served.records[0].principal_id == ("user-1" if headers else None)


@pytest.mark.parametrize(
    ("method", "path"), [("GET", CHAT), ("DELETE", "/v1/models"), ("POST", "/v1/models/small")]
)
async def test_wrong_method(served: World, http: httpx.AsyncClient, method: str, path: str) -> None:
    response = await http.request(method, path)
    await refused(served, response, 405, "method_not_allowed")
    assert response.headers["allow"] == ("POST" if path == CHAT else "GET")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("PROPFIND", CHAT, 405, "method_not_allowed"),
        ("TRACE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/docs/assets/nothing.css", 404, "not_found"),
        ("POST", "/docs/assets/swagger-ui.css", 405, "method_not_allowed"),
    ],
)
async def test_what_the_framework_refuses_by_itself(
    served: World, http: httpx.AsyncClient, method: str, path: str, status: int, code: str
) -> None:
    response = await http.request(method, path)
    await refused(served, response, status, code)
    assert ("allow" in response.headers) == (status == 405)


@pytest.mark.parametrize("chunked", [False, True])
async def test_body_over_the_limit(chunked: bool) -> None:
    async with world(max_body_bytes=4096) as served, client(served) as http:
        body = orjson.dumps(ask(TEXT, "x" * 5000))

        async def parts() -> AsyncIterator[bytes]:
            for start in range(0, len(body), 1000):
                yield body[start : start + 1000]

        response = await http.post(TEXT, content=parts() if chunked else body)
        error = await refused(served, response, 413, "request_too_large")
        assert "4096" in error["message"]
        assert served.replica.counters.completion_tokens == 0


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": "application/json", "content-encoding": "gzip"},
        {"content-encoding": "br"},
    ],
)
async def test_body_that_says_that_it_is_not_plain_json(
    served: World, http: httpx.AsyncClient, headers: dict[str, str]
) -> None:
    response = await http.post(TEXT, content=orjson.dumps(ask(TEXT)), headers=headers)
    await refused(served, response, 415, "unsupported_media_type")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "Application/JSON; charset=utf-8"},
        {"content-type": "application/vnd.api+json", "content-encoding": "identity"},
    ],
)
async def test_body_that_is_plain_json(
    served: World, http: httpx.AsyncClient, headers: dict[str, str]
) -> None:
    response = await http.post(TEXT, content=orjson.dumps(ask(TEXT)), headers=headers)
    assert response.status_code == 200


async def test_body_that_does_not_arrive() -> None:
    async with world(body_timeout_s=0.2) as served:
        reader, writer = await asyncio.open_connection(*served.server.address.split(":"))
        writer.write(
            f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n"
            f"Authorization: {AUTHORIZATION['authorization']}\r\n\r\n".encode()
            + b'{"model": '
        )
        async with asyncio.timeout(20):
            head = await reader.readuntil(b"\r\n\r\n")
        writer.close()
        assert head.startswith(b"HTTP/1.1 408")
        record = await served.the_record()
        assert (record.status, record.error_code) == (408, "request_timeout")


async def test_body_at_the_limit() -> None:
    body = orjson.dumps(ask(TEXT, "x" * 5000))
    async with world(max_body_bytes=len(body)) as served, client(served) as http:
        assert (await http.post(TEXT, content=body)).status_code == 200


async def test_body_that_nginx_refused(served: World, http: httpx.AsyncClient) -> None:
    await refused(served, await http.post("/-/refused/413"), 413, "request_too_large")


@pytest.mark.parametrize("stream", [True, False])
async def test_rate_limit(stream: bool) -> None:
    async with world(limits={"default": {"requests_per_minute": 1}}) as served:
        async with client(served) as http:
            assert (await http.post(TEXT, json=ask(TEXT))).status_code == 200
            await served.quiet()
            served.records.clear()
            served.lines.truncate(0)
            served.lines.seek(0)
            response = await http.post(TEXT, json=ask(TEXT, stream=stream))
            error = await refused(served, response, 429, "rate_limit_exceeded")
        retry_after_s = int(response.headers["retry-after"])
        assert 1 <= retry_after_s <= 60
        assert f"{retry_after_s} s" in error["message"]
        assert served.records[0].outcome is Outcome.REFUSED


@pytest.mark.parametrize("stream", [True, False])
async def test_answers_tell_what_is_left_of_the_limit(stream: bool) -> None:
    async with (
        world(limits={"default": {"requests_per_minute": 2}}) as served,
        client(served) as http,
    ):
        left = []
        for _ in range(3):
            response = await http.post(TEXT, json=ask(TEXT, stream=stream))
            assert response.headers["x-ratelimit-limit-requests"] == "2"
            assert re.fullmatch(
                r"\d+(\.\d+)?s|1m0s", response.headers["x-ratelimit-reset-requests"]
            )
            left.append((response.status_code, response.headers["x-ratelimit-remaining-requests"]))
        assert left == [(200, "1"), (200, "0"), (429, "0")]
        models = await http.get("/v1/models")
        assert "x-ratelimit-limit-requests" not in models.headers  # it takes nothing


async def test_no_limit_is_not_told(served: World, http: httpx.AsyncClient) -> None:
    response = await http.post(TEXT, json=ask(TEXT))
    assert not [name for name in response.headers if name.startswith("x-ratelimit")]


async def test_concurrency_limit() -> None:
    async with world(limits={"default": {"concurrency": 1}}) as served, client(served) as http:
        served.pool.gate.shut()
        first = asyncio.create_task(http.post(TEXT, json=ask(TEXT)))
        await served.pool.gate.reached()
        second = await http.post(TEXT, json=ask(TEXT))
        assert second.status_code == 429
        served.pool.gate.open()
        assert (await first).status_code == 200
        # The first has given its place back before its answer was complete.
        assert (await http.post(TEXT, json=ask(TEXT))).status_code == 200
        await served.quiet(records=3)


@pytest.mark.parametrize(
    "error",
    [ModelOverloaded(), ModelNotReady(retry_after_s=7), EngineFailed()],
    ids=lambda error: str(error.code),
)
@pytest.mark.parametrize("stream", [True, False])
async def test_pool_refuses(
    served: World, http: httpx.AsyncClient, error: RequestError, stream: bool
) -> None:
    served.pool.error = error
    response = await http.post(TEXT, json=ask(TEXT, stream=stream))
    await refused(served, response, error.status, str(error.code))
    # Of a full queue before anything was measured: the longest wait.
    expected = {"model_overloaded": "30", "model_not_ready": "7"}.get(str(error.code))
    assert response.headers.get("retry-after") == expected


async def test_nobody_grants_a_lease_in_time() -> None:
    async with world(queue_timeout_s=0.1) as served, client(served) as http:
        served.pool.gate.shut()
        response = await http.post(TEXT, json=ask(TEXT))
        await refused(served, response, 503, "model_not_ready")
        assert int(response.headers["retry-after"]) >= 1
        assert served.records[0].queue_ms is not None


async def test_identity_is_away(served: World, http: httpx.AsyncClient) -> None:
    served.authenticator.error = IdentityUnavailable()
    await refused(served, await http.post(TEXT, json=ask(TEXT)), 503, "identity_unavailable")


async def test_limits_are_away(served: World, http: httpx.AsyncClient) -> None:
    served.limits.error = LimitsUnavailable(retry_after_s=10)
    response = await http.post(TEXT, json=ask(TEXT))
    await refused(served, response, 503, "limits_unavailable")
    assert response.headers["retry-after"] == "10"


async def test_a_bug_is_a_500_that_quotes_nothing(
    served: World, http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    served.pool.error = ZeroDivisionError("PROMPT-TEXT")
    response = await http.post(TEXT, json=ask(TEXT, "PROMPT-TEXT"))
    error = await refused(served, response, 500, "internal_error")
    assert "PROMPT-TEXT" not in error["message"]
    assert "ZeroDivisionError" in caplog.text
    assert "PROMPT-TEXT" not in caplog.text


# The log.


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_log_is_away_whole(served: World, http: httpx.AsyncClient, path: str) -> None:
    served.log.error = LogUnavailable()
    response = await http.post(path, json=ask(path))
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "request_log_unavailable"
    assert "w0" not in response.text
    assert not served.records


async def test_log_that_fails_in_another_way(served: World, http: httpx.AsyncClient) -> None:
    served.log.error = ModelOverloaded()
    response = await http.post(TEXT, json=ask(TEXT))
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "request_log_unavailable"


async def test_log_is_away_stream(served: World, http: httpx.AsyncClient) -> None:
    served.log.error = LogUnavailable()
    response = await http.post(TEXT, json=ask(TEXT, stream=True))
    assert response.status_code == 200
    events = parse_events(response.text)
    assert events[-1]["error"]["code"] == "request_log_unavailable"
    assert "[DONE]" not in events


async def test_log_that_hangs_is_given_up() -> None:
    async with world(record_timeout_s=0.1) as served, client(served) as http:
        served.log.gate.shut()
        response = await http.post(TEXT, json=ask(TEXT))
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "request_log_unavailable"
        assert served.limits.held("user-1") == 0


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_done_is_sent_only_after_the_record_is_safe(
    served: World, http: httpx.AsyncClient, path: str
) -> None:
    served.log.gate.shut()
    lines: list[str] = []

    async def read() -> None:
        async with http.stream("POST", path, json=ask(path, stream=True)) as response:
            async for line in response.aiter_lines():
                lines.append(line)

    reading = asyncio.create_task(read())
    await served.log.gate.reached()
    await until(lambda: any('"finish_reason":"length"' in line for line in lines))
    assert "last" not in served.events
    assert not [line for line in lines if "[DONE]" in line]
    served.log.gate.open()
    await reading
    assert lines[-2:] == ["data: [DONE]", ""]
    assert served.events.index("recorded") < served.events.index("last")


async def test_whole_answer_is_sent_only_after_the_record_is_safe(
    served: World, http: httpx.AsyncClient
) -> None:
    served.log.gate.shut()
    asking = asyncio.create_task(http.post(TEXT, json=ask(TEXT)))
    await served.log.gate.reached()
    assert served.events == []
    served.log.gate.open()
    assert (await asking).status_code == 200
    assert served.events == ["recorded", "start", "last"]


async def test_async_durability_does_not_wait() -> None:
    async with world(durability="async") as served, client(served) as http:
        served.log.gate.shut()
        response = await http.post(TEXT, json=ask(TEXT, stream=True))
        assert parse_events(response.text)[-1] == "[DONE]"
        assert not served.records
        served.log.gate.open()
        await served.quiet()


async def test_close_waits_for_records_that_are_under_way() -> None:
    async with world(durability="async") as served, client(served) as http:
        served.log.gate.shut()
        await http.post(TEXT, json=ask(TEXT))
        closing = asyncio.create_task(served.gateway.close())
        await served.log.gate.reached()
        assert not closing.done()
        served.log.gate.open()
        await closing
        assert len(served.records) == 1


# The engine and the deadline.


async def test_deadline_of_a_whole_answer() -> None:
    async with world(deadline_s=0.5) as served, client(served) as http:
        response = await http.post(TEXT, json=ask(TEXT, "[[stall_after=2]]"))
        await refused(served, response, 504, "deadline_exceeded")
        (row,) = served.records
        assert (row.outcome, row.completion_tokens) == (Outcome.TIMED_OUT, 2)
        served.assert_accounts_add_up()


async def test_deadline_in_the_middle_of_a_stream() -> None:
    async with world(deadline_s=0.5) as served, client(served) as http:
        response = await http.post(TEXT, json=ask(TEXT, "[[stall_after=2]]", stream=True))
        assert response.status_code == 200
        events = parse_events(response.text)
        assert events[-1]["error"]["code"] == "deadline_exceeded"
        assert "[DONE]" not in events
        row = await served.the_record()
        assert (row.outcome, row.status, row.completion_tokens) == (Outcome.TIMED_OUT, 504, 2)
        served.assert_accounts_add_up()


@pytest.mark.parametrize("stream", [True, False])
async def test_deadline_before_the_engine(stream: bool) -> None:
    async with world(deadline_s=0.2) as served, client(served) as http:
        served.limits.gate.shut()
        response = await http.post(TEXT, json=ask(TEXT, stream=stream))
        await refused(served, response, 504, "deadline_exceeded")
        assert served.records[0].outcome is Outcome.TIMED_OUT


@pytest.mark.parametrize("stream", [True, False])
async def test_engine_fails(served: World, http: httpx.AsyncClient, stream: bool) -> None:
    response = await http.post(TEXT, json=ask(TEXT, "[[error=500]]", stream=stream))
    error = await refused(served, response, 502, "engine_error")
    assert "told to fail" not in error["message"]  # what a broken engine says stays here
    assert served.records[0].outcome is Outcome.FAILED


@pytest.mark.parametrize("status", [400, 413, 422, 501])
@pytest.mark.parametrize("stream", [True, False])
async def test_engine_refuses_the_request(
    served: World, http: httpx.AsyncClient, stream: bool, status: int
) -> None:
    response = await http.post(TEXT, json=ask(TEXT, f"[[error={status}]]", stream=stream))
    error = await refused(served, response, 400, "invalid_value")
    assert error["message"] == "told to fail"
    assert served.records[0].outcome is Outcome.REFUSED


@pytest.mark.parametrize("status", [401, 403, 405, 408, 409, 418, 500, 502, 504])
async def test_what_is_not_the_clients_fault_is_not_told_as_one(
    served: World, http: httpx.AsyncClient, status: int
) -> None:
    response = await http.post(TEXT, json=ask(TEXT, f"[[error={status}]]"))
    error = await refused(served, response, 502, "engine_error")
    assert "told to fail" not in error["message"]
    assert served.records[0].outcome is Outcome.FAILED


async def test_an_engine_that_knows_no_such_model_is_the_operators(
    served: World, http: httpx.AsyncClient
) -> None:
    response = await http.post(TEXT, json=ask(TEXT, "[[error=404]]"))
    error = await refused(served, response, 503, "model_not_ready")
    assert "`engine_name`" in error["message"]
    assert served.records[0].outcome is Outcome.FAILED


@pytest.mark.parametrize("status", [429, 503])
async def test_an_engine_that_takes_no_more_says_when_to_try_again(
    served: World, http: httpx.AsyncClient, status: int
) -> None:
    response = await http.post(TEXT, json=ask(TEXT, f"[[error={status}]]"))
    await refused(served, response, 503, "model_overloaded")
    assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_engine_drops_a_stream(served: World, http: httpx.AsyncClient, path: str) -> None:
    response = await http.post(path, json=ask(path, "[[drop_after=3]]", stream=True))
    assert response.status_code == 200
    *chunks, last = parse_events(response.text)
    assert last["error"]["code"] == "engine_error"
    assert "".join(text_of(chunk) for chunk in chunks) == "w0 w1 w2 "
    row = await served.the_record()
    assert (row.outcome, row.status, row.error_code) == (Outcome.FAILED, 502, "engine_error")
    assert row.completion_tokens == 3
    assert row.response_text == "w0 w1 w2 "


@pytest.mark.parametrize("stream", [True, False])
async def test_engine_drops_before_the_first_token(
    served: World, http: httpx.AsyncClient, stream: bool
) -> None:
    response = await http.post(TEXT, json=ask(TEXT, "[[drop_after=0]]", stream=stream))
    await refused(served, response, 502, "engine_error")
    assert served.records[0].completion_tokens == 0


async def test_replica_is_gone(served: World, http: httpx.AsyncClient) -> None:
    served.replica.server.address = "127.0.0.1:9"  # discard: nobody listens
    response = await http.post(TEXT, json=ask(TEXT))
    await refused(served, response, 502, "engine_error")


# An engine that does not keep to the form.


def _engine(content: bytes, status: int = 200) -> Starlette:
    async def answer(request: Request) -> Response:
        await request.body()
        return PlainTextResponse(content, status)

    return Starlette(routes=[Route("/{path:path}", answer, methods=["POST"])])


@pytest.mark.parametrize("content", [b"no JSON", b"[]", b'"text"', b'{"choices": [null]}'])
async def test_odd_whole_answer_still_leaves_a_record(content: bytes) -> None:
    async with world(engine_app=_engine(content)) as served, client(served) as http:
        response = await http.post(TEXT, json=ask(TEXT))
        assert response.content == content
        assert (await served.the_record()).completion_tokens == 0


async def test_stream_without_content_is_a_stream() -> None:
    async with world(engine_app=_engine(b"data: [DONE]\n\n")) as served, client(served) as http:
        response = await http.post(TEXT, json=ask(TEXT, stream=True))
        assert response.text == "data: [DONE]\n\n"
        assert response.headers["content-type"].startswith("text/event-stream")
        assert (await served.the_record()).outcome is Outcome.COMPLETED


async def test_error_frame_of_the_engine() -> None:
    token = b'data: {"choices":[{"index":0,"text":"Yes."}]}\n\n'
    error = b'data: {"error": {"message": "too long", "code": 400}}\n\n'
    app = _engine(token + error + b"data: [DONE]\n\n")
    async with world(engine_app=app) as served, client(served) as http:
        response = await http.post(TEXT, json=ask(TEXT, stream=True))
        first, last = parse_events(response.text)
        assert text_of(first) == "Yes."
        assert last["error"]["message"] == "too long"
        row = await served.the_record()
        assert (row.status, row.completion_tokens, row.response_text) == (400, 1, "Yes.")


async def test_bytes_of_the_engine_are_relayed_untouched() -> None:
    frames = (
        b': hello\n\ndata: {"choices": [ {"index":0, "text":"data: [DONE] \\"usage\\":{"} ]}\n\n'
    )
    app = _engine(frames + b"data: [DONE]\n\n")
    async with world(engine_app=app) as served, client(served) as http:
        response = await http.post(TEXT, json=ask(TEXT, stream=True))
        assert response.content == frames + b"data: [DONE]\n\n"


# What fails on the way back does not take the answer along.


class _Broken:
    def __init__(self, error: Exception) -> None:
        self.asked = 0
        self._error = error

    def request_finished(self, record: RequestRecord, model_label: str) -> None:
        self.asked += 1
        raise self._error


@pytest.mark.parametrize("stream", [True, False])
async def test_metrics_that_fail_do_not_take_the_answer_along(
    served: World, http: httpx.AsyncClient, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    broken = _Broken(ZeroDivisionError("PROMPT-TEXT"))
    served.gateway.parts = replace(served.gateway.parts, metrics=broken)
    response = await http.post(TEXT, json=ask(TEXT, "PROMPT-TEXT", stream=stream))
    assert response.status_code == 200
    assert ("[DONE]" in response.text) is stream
    assert (await served.the_record()).outcome is Outcome.COMPLETED
    assert broken.asked == 1
    assert "ZeroDivisionError" in caplog.text
    assert "PROMPT-TEXT" not in caplog.text


@pytest.mark.parametrize("stream", [True, False])
async def test_limits_that_fail_to_settle_do_not_take_the_answer_along(
    served: World, http: httpx.AsyncClient, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def settle(*_: object) -> None:
        raise ZeroDivisionError

    served.limits.settle = settle  # type: ignore[method-assign]
    response = await http.post(TEXT, json=ask(TEXT, stream=stream))
    assert response.status_code == 200
    assert [row.outcome for row in served.records] == [Outcome.COMPLETED]
    assert "settle of request" in caplog.text


@pytest.mark.parametrize("stream", [True, False])
async def test_log_with_a_bug_withholds_the_answer(
    served: World, http: httpx.AsyncClient, stream: bool
) -> None:
    served.log.error = ZeroDivisionError()
    response = await http.post(TEXT, json=ask(TEXT, stream=stream))
    assert response.status_code == (200 if stream else 503)
    assert "request_log_unavailable" in response.text
    assert "[DONE]" not in response.text
    assert served.limits.held("user-1") == 0
    await until(lambda: served.replica.counters.live_leases == 0)
