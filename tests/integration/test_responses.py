"""The responses API over real HTTP: OpenAI's client, a real gateway, a real PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import orjson
import pytest
from openai.types.responses import Response

from serve_app.database import connect
from serve_app.errors import LogUnavailable
from serve_app.fake_engine import FakeEngineConfig
from serve_app.lazy_pool import build_pool
from serve_app.records import Outcome
from serve_app.settings import PostgresSettings
from serve_app.stored import background
from serve_app.stored.responses import ResponseStore
from tests.integration.conftest import PostgresServer
from tests.integration.fakes import (
    KEY,
    World,
    client,
    principal,
    until,
    world,
)
from tests.sealing import VAULT

PATH = "/v1/responses"
SLOW = FakeEngineConfig(time_to_first_token_s=0.0, time_per_token_s=0.05)
OTHER_KEY = "key-of-another"


def ask(**more: Any) -> dict[str, Any]:
    """Return a body."""
    return {"model": "small", "input": "one two three", "max_output_tokens": 5, **more}


def parse(text: str) -> list[dict[str, Any]]:
    """Return the events of a stream, each of which must be named as its data says."""
    found = []
    for frame in text.split("\n\n"):
        if not frame:
            continue
        name, _, data = frame.partition("\n")
        found.append(orjson.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


@pytest.fixture
async def served(database: PostgresSettings) -> AsyncIterator[World]:
    """A gateway with a store, as fast as it can be."""
    async with world(database=database) as made:
        made.authenticator.principals[OTHER_KEY] = principal("user-2")
        yield made


@pytest.fixture
async def http(served: World) -> AsyncIterator[httpx.AsyncClient]:
    """A client that is signed in at `served`."""
    async with client(served) as made:
        yield made


@asynccontextmanager
async def signed_in(served: World, key: str = KEY) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's client, signed in at `served`."""
    url = f"{served.url}/v1"
    async with openai.AsyncOpenAI(api_key=key, base_url=url, max_retries=0) as api:
        yield api


@pytest.fixture
async def api(served: World) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's client at `served`."""
    async with signed_in(served) as made:
        yield made


async def ended(api: openai.AsyncOpenAI, response: Response) -> Response:
    """Poll a background response until it has ended."""
    async with asyncio.timeout(20):
        while response.status in ("queued", "in_progress"):
            response = await api.responses.retrieve(response.id)
    return response


# Create.


async def test_create_and_retrieve(served: World, api: openai.AsyncOpenAI) -> None:
    made = await api.responses.create(**ask(metadata={"topic": "tests"}))
    assert made.output_text == "w0 w1 w2 w3 w4 "
    assert (made.status, made.model, made.id[:5]) == ("incomplete", "small", "resp_")
    assert made.incomplete_details is not None
    assert made.incomplete_details.reason == "max_output_tokens"
    assert made.usage is not None
    assert (made.usage.input_tokens, made.usage.output_tokens) == (3, 5)
    assert (made.metadata, made.previous_response_id) == ({"topic": "tests"}, None)
    assert made.to_dict()["store"] is True
    assert (await api.responses.retrieve(made.id)).to_dict() == made.to_dict()
    await served.quiet(records=2)
    row, other = served.records
    assert (row.route, other.route) == ("responses", "responses.retrieve")
    assert (row.outcome, row.status, row.finish_reason) == (Outcome.COMPLETED, 200, "length")
    assert (row.prompt_tokens, row.completion_tokens) == (3, 5)
    assert row.response_text == "w0 w1 w2 w3 w4 "
    assert made.id == f"resp_{row.id.hex}"
    served.assert_accounts_add_up()


async def test_create_as_a_stream(served: World, api: openai.AsyncOpenAI) -> None:
    async with await api.responses.create(**ask(stream=True)) as stream:
        events = [event async for event in stream]
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * 5,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == "w0 w1 w2 w3 w4 "
    assert (await api.responses.retrieve(last.response.id)).to_dict() == last.response.to_dict()
    await served.quiet(records=2)
    row = served.records[0]
    assert (row.stream, row.finish_reason, row.response_text) == (True, "length", "w0 w1 w2 w3 w4 ")
    assert (row.prompt_tokens, row.completion_tokens) == (3, 5)
    served.assert_accounts_add_up()


async def test_stream_helper(api: openai.AsyncOpenAI) -> None:
    async with api.responses.stream(model="small", input="Hi", max_output_tokens=3) as stream:
        texts = [e.delta async for e in stream if e.type == "response.output_text.delta"]
        final = await stream.get_final_response()
    assert "".join(texts) == final.output_text == "w0 w1 w2 "


async def test_what_is_not_stored_passes_untouched(served: World, http: httpx.AsyncClient) -> None:
    first = await http.post(PATH, json=ask(store=False, stream=True))
    ours = parse(first.text)
    assert all("store" not in event.get("response", {}) for event in ours)
    gone = await http.get(f"{PATH}/{ours[0]['response']['id']}")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "response_not_found")


async def test_an_engine_that_answers_with_something_else(database: PostgresSettings) -> None:
    async def engine(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"{}"})

    async with world(engine_app=engine, database=database) as made, client(made) as http:
        answer = await http.post(PATH, json=ask())
    assert answer.status_code == 200
    assert answer.json()["store"] is False


async def test_what_the_engine_is_sent(database: PostgresSettings) -> None:
    got: list[dict[str, Any]] = []

    async def engine(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        got.append(orjson.loads(message["body"]))
        headers = [(b"content-type", b"application/json")]
        body = orjson.dumps({"id": got[-1]["request_id"], "status": "completed", "output": []})
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    models = [{"name": "small", "app": "a", "max_tokens": 10, "default_max_tokens": 7}]
    async with world(engine_app=engine, database=database, models=models) as made:
        async with client(made) as http:
            nulls = {"truncation": None, "tools": None, "background": None, "metadata": None}
            body = {"model": "small", "input": "Hi", "store": True, "stream": False, **nulls}
            assert (await http.post(PATH, json=body)).status_code == 200
            too_many = await http.post(PATH, json={**body, "max_output_tokens": 11})
            assert too_many.json()["error"]["param"] == "max_output_tokens"
        row = made.records[0]
    assert got == [
        {
            "model": "small",
            "input": "Hi",
            "store": False,
            "stream": False,
            "temperature": 0.7,
            "max_output_tokens": 7,
            "request_id": f"resp_{row.id.hex}",
        }
    ]


# Refusals.


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"conversation": "conv_1"}, "conversation"),
        ({"max_tool_calls": 1}, "max_tool_calls"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"request_id": "resp_mine"}, "request_id"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"background": True, "stream": True}, "background"),
    ],
)
async def test_unsupported(
    served: World, http: httpx.AsyncClient, more: dict[str, Any], param: str
) -> None:
    response = await http.post(PATH, json=ask(**more))
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "unsupported_parameter")
    assert error["param"] == param
    assert (await served.the_record()).outcome is Outcome.REFUSED


async def test_nothing_is_stored_where_no_bodies_are_kept(database: PostgresSettings) -> None:
    async with world(database=database, bodies="none") as made, client(made) as http:
        explicit = await http.post(PATH, json=ask(store=True))
        assert (explicit.status_code, explicit.json()["error"]["param"]) == (400, "store")
        implicit = await http.post(PATH, json=ask())
        assert implicit.status_code == 200
        assert (await http.get(f"{PATH}/{implicit.json()['id']}")).status_code == 404
        assert (await http.post(PATH, json=ask(background=True))).status_code == 400
    assert await count(database) == 0


async def count(database: PostgresSettings) -> int:
    """Return how many responses are stored."""
    return int(await execute(database, "select count(*) from comp_ai.responses"))


async def execute(database: PostgresSettings, statement: str, *args: object) -> Any:
    """Run one statement and return what it returns first."""
    connection = await connect(database, application_name="tests")
    try:
        return await connection.fetchval(statement, *args)
    finally:
        await connection.close()


async def test_engine_that_fails_is_told_to_openais_client(
    served: World, api: openai.AsyncOpenAI, database: PostgresSettings
) -> None:
    got = []
    with pytest.raises(openai.APIError, match="model failed") as raised:
        async with await api.responses.create(**ask(input="[[drop_after=2]]", stream=True)) as s:
            got = [event.type async for event in s if got.append(event.type) is None]
    assert got.count("response.output_text.delta") == 2
    assert raised.value.code == "engine_error"
    row = await served.the_record()
    assert (row.outcome, row.error_code, row.completion_tokens) == (
        Outcome.FAILED,
        "engine_error",
        2,
    )
    assert await count(database) == 0


async def test_error_event_in_full(served: World, http: httpx.AsyncClient) -> None:
    response = await http.post(PATH, json=ask(input="[[drop_after=2]]", stream=True))
    assert response.status_code == 200
    *others, last = parse(response.text)
    assert last["type"] == "error"
    assert last["sequence_number"] == others[-1]["sequence_number"] + 1
    assert last["code"] == last["error"]["code"] == "engine_error"
    assert last["message"] == last["error"]["message"]


async def test_last_event_waits_for_the_record(served: World, http: httpx.AsyncClient) -> None:
    served.log.error = LogUnavailable()
    response = await http.post(PATH, json=ask(stream=True))
    last = parse(response.text)[-1]
    assert (last["type"], last["code"]) == ("error", "request_log_unavailable")
    assert "response.completed" not in response.text


@pytest.mark.parametrize("stream", [True, False])
async def test_client_that_goes_away(database: PostgresSettings, stream: bool) -> None:
    async with world(SLOW, database=database) as made, client(made) as http:
        body = ask(max_output_tokens=1000, stream=stream)
        asking = asyncio.create_task(http.post(PATH, json=body))
        await until(lambda: made.replica.counters.completion_tokens > 2)
        asking.cancel()
        row = await made.the_record()
        assert row.outcome is Outcome.CANCELLED
        assert 2 < row.completion_tokens < 1000
        made.assert_accounts_add_up()
        assert await count(database) == 0


# Retrieve, delete, input items.


async def test_only_the_owner_reaches_a_response(served: World, api: openai.AsyncOpenAI) -> None:
    made = await api.responses.create(**ask())
    running = await api.responses.create(**ask(background=True))
    async with signed_in(served, OTHER_KEY) as other:
        for response_id in (made.id, running.id, "resp_unknown"):
            for step in (
                other.responses.retrieve(response_id),
                other.responses.delete(response_id),
                other.responses.cancel(response_id),
                other.responses.input_items.list(response_id),
                other.responses.create(**ask(previous_response_id=response_id)),
            ):
                with pytest.raises(openai.NotFoundError) as raised:
                    await step
                assert raised.value.code == "response_not_found"
        assert raised.value.param == "previous_response_id"
    assert (await api.responses.retrieve(made.id)).id == made.id


async def test_without_a_credential(served: World) -> None:
    async with httpx.AsyncClient(base_url=served.url) as http:
        for method, path in (
            ("GET", f"{PATH}/resp_1"),
            ("DELETE", f"{PATH}/resp_1"),
            ("POST", f"{PATH}/resp_1/cancel"),
            ("GET", f"{PATH}/resp_1/input_items"),
        ):
            assert (await http.request(method, path)).status_code == 401


async def test_delete(served: World, api: openai.AsyncOpenAI, http: httpx.AsyncClient) -> None:
    made = await api.responses.create(**ask())
    answer = await http.delete(f"{PATH}/{made.id}")
    assert answer.json() == {"id": made.id, "object": "response", "deleted": True}
    with pytest.raises(openai.NotFoundError):
        await api.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        await api.responses.retrieve(made.id)


@pytest.mark.parametrize(
    "query", ["stream=true", "starting_after=1", "include[]=message.output_text.logprobs"]
)
async def test_retrieving_refuses_what_it_does_not_do(http: httpx.AsyncClient, query: str) -> None:
    made = (await http.post(PATH, json=ask())).json()
    refused = await http.get(f"{PATH}/{made['id']}?{query}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unsupported_parameter")
    assert (await http.get(f"{PATH}/{made['id']}?stream=false")).status_code == 200


async def test_input_items(api: openai.AsyncOpenAI) -> None:
    first = await api.responses.create(**ask(input="Hi"))
    said = [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "function_call", "id": "fc_1", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "42"},
    ]
    second = await api.responses.create(**ask(input=said, previous_response_id=first.id))
    items = [i async for i in api.responses.input_items.list(second.id, order="asc", limit=2)]
    assert [one.type for one in items] == [
        "message",
        "message",
        "message",
        "function_call",
        "function_call_output",
    ]
    assert [getattr(one, "role", None) for one in items[:3]] == ["user", "assistant", "user"]
    newest = await api.responses.input_items.list(second.id, limit=1)
    assert ([i.id for i in newest.data], newest.has_more) == ([items[-1].id], True)
    rest = await api.responses.input_items.list(second.id, after=items[-1].id)
    assert [i.id for i in rest.data] == [i.id for i in items[-2::-1]]
    assert not rest.has_more


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=x", "limit"),
        ("limit=99999999999999999999", "limit"),
        ("order=up", "order"),
        ("after=item_9", "after"),
        ("before=item_9", "before"),
    ],
)
async def test_wrong_page(http: httpx.AsyncClient, query: str, param: str) -> None:
    made = (await http.post(PATH, json=ask())).json()
    refused = await http.get(f"{PATH}/{made['id']}/input_items?{query}")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


# Conversations.


async def test_conversation(served: World, api: openai.AsyncOpenAI) -> None:
    first = await api.responses.create(**ask(input="a b c", instructions="be brief"))
    assert first.usage is not None
    assert first.usage.input_tokens == 5
    second = await api.responses.create(**ask(input="d e", previous_response_id=first.id))
    assert second.usage is not None
    # What was said, and the answer; not the instructions.
    assert second.usage.input_tokens == 3 + 5 + 2
    assert second.previous_response_id == first.id
    async with await api.responses.create(
        **ask(input="f", previous_response_id=second.id, stream=True, store=False)
    ) as stream:
        events = [event async for event in stream]
    for event in (events[0], events[-1]):
        assert event.type in ("response.created", "response.completed")
        assert event.response.previous_response_id == second.id
    last = events[-1].response
    assert last.usage.input_tokens == 10 + 5 + 1
    with pytest.raises(openai.NotFoundError):
        await api.responses.retrieve(last.id)
    served.assert_accounts_add_up()


async def test_conversation_whose_beginning_was_deleted(api: openai.AsyncOpenAI) -> None:
    first = await api.responses.create(**ask())
    second = await api.responses.create(**ask(previous_response_id=first.id))
    await api.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError) as raised:
        await api.responses.create(**ask(previous_response_id=second.id))
    assert raised.value.param == "previous_response_id"
    assert first.id in raised.value.message


async def test_conversation_that_is_too_long(database: PostgresSettings) -> None:
    async with world(database=database, max_body_bytes=4096) as made, client(made) as http:
        before = None
        for _ in range(10):
            answer = await http.post(PATH, json=ask(previous_response_id=before))
            if answer.status_code != 200:
                break
            before = answer.json()["id"]
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "previous_response_id"


# PostgreSQL away.


async def test_nothing_is_generated_where_it_cannot_be_stored() -> None:
    async with world() as made, client(made) as http:
        for body in (ask(), ask(stream=True), ask(background=True), ask(previous_response_id="x")):
            refused = await http.post(PATH, json=body)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "store_unavailable"
            assert "retry-after" in refused.headers
        assert made.replica.counters.prompt_tokens == 0
        assert (await http.get(f"{PATH}/resp_1")).status_code == 503
        assert (await http.post(PATH, json=ask(store=False))).status_code == 200
        await made.quiet(records=6)


@pytest.mark.parametrize("stream", [True, False])
async def test_answer_says_that_it_was_not_stored(own_server: PostgresServer, stream: bool) -> None:
    async with world(database=own_server.embedded.settings()) as made, client(made) as http:
        made.pool.gate.shut()
        asking = asyncio.create_task(http.post(PATH, json=ask(stream=stream)))
        await made.pool.gate.reached()
        own_server.kill()
        made.pool.gate.open()
        response = await asking
        assert response.status_code == 200
        answer = parse(response.text)[-1]["response"] if stream else response.json()
        assert (answer["store"], answer["status"]) == (False, "incomplete")
        assert (await made.the_record()).outcome is Outcome.COMPLETED


# In the background.


async def test_background(served: World, api: openai.AsyncOpenAI) -> None:
    served.pool.gate.shut()
    queued = await api.responses.create(**ask(background=True, metadata={"a": "b"}))
    assert (queued.status, queued.background, queued.output) == ("queued", True, [])
    await served.pool.gate.reached()
    running = await api.responses.retrieve(queued.id)
    assert (running.status, running.usage) == ("in_progress", None)
    served.pool.gate.open()
    done = await ended(api, running)
    assert (done.id, done.created_at, done.background) == (queued.id, queued.created_at, True)
    assert (done.status, done.output_text) == ("incomplete", "w0 w1 w2 w3 w4 ")
    assert done.metadata == {"a": "b"}
    assert done.to_dict()["store"] is True
    rows = [row for row in served.records if row.route == "responses"]
    assert sorted(row.completion_tokens for row in rows) == [0, 5]
    assert {row.principal_id for row in rows} == {"user-1"}
    assert len({row.request_id for row in rows}) == 1
    served.assert_accounts_add_up()
    again = await api.responses.create(**ask(previous_response_id=done.id))
    assert again.usage is not None
    assert again.usage.input_tokens == 3 + 5 + 3


async def test_background_continues_a_conversation(api: openai.AsyncOpenAI) -> None:
    first = await api.responses.create(**ask())
    made = await api.responses.create(**ask(background=True, previous_response_id=first.id))
    done = await ended(api, made)
    assert done.previous_response_id == first.id
    assert done.usage is not None
    assert done.usage.input_tokens == 3 + 5 + 3
    items = [one async for one in api.responses.input_items.list(done.id)]
    assert len(items) == 3


async def test_background_that_fails(served: World, api: openai.AsyncOpenAI) -> None:
    failed = await ended(
        api, await api.responses.create(**ask(input="[[error=500]]", background=True))
    )
    assert failed.status == "failed"
    assert failed.error is not None
    assert failed.error.code == "server_error"
    refused = await ended(
        api, await api.responses.create(**ask(input="[[error=400]]", background=True))
    )
    assert refused.error is not None
    assert (refused.error.code, refused.error.message) == ("invalid_prompt", "told to fail")
    with pytest.raises(openai.BadRequestError):
        await api.responses.create(**ask(previous_response_id=failed.id))


async def test_cancel(database: PostgresSettings) -> None:
    async with world(SLOW, database=database) as made, signed_in(made) as api:
        queued = await api.responses.create(**ask(background=True, max_output_tokens=1000))
        await until(lambda: made.replica.counters.completion_tokens > 2)
        for _ in range(2):
            assert (await api.responses.cancel(queued.id)).status == "cancelled"
        await until(lambda: made.replica.counters.requests_running == 0)
        await until(lambda: Outcome.CANCELLED in {row.outcome for row in made.records})
        assert (await api.responses.retrieve(queued.id)).status == "cancelled"
        made.assert_accounts_add_up()


async def test_delete_ends_a_background_response(database: PostgresSettings) -> None:
    async with world(SLOW, database=database) as made, signed_in(made) as api:
        queued = await api.responses.create(**ask(background=True, max_output_tokens=1000))
        await until(lambda: made.replica.counters.completion_tokens > 2)
        await api.responses.delete(queued.id)
        await until(lambda: made.replica.counters.requests_running == 0)
        await until(lambda: Outcome.CANCELLED in {row.outcome for row in made.records})
        assert await count(database) == 0


async def test_cancel_from_another_gateway(
    database: PostgresSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "BEAT_S", 0.05)
    async with (
        world(SLOW, database=database) as here,
        world(database=database) as there,
        signed_in(here) as api,
        signed_in(there) as other,
    ):
        queued = await api.responses.create(**ask(background=True, max_output_tokens=1000))
        await until(lambda: here.replica.counters.completion_tokens > 2)
        assert (await other.responses.cancel(queued.id)).status == "cancelled"
        await until(lambda: here.replica.counters.requests_running == 0)
        await until(lambda: Outcome.CANCELLED in {row.outcome for row in here.records})
        assert (await api.responses.retrieve(queued.id)).status == "cancelled"


async def test_only_background_responses_are_cancelled(api: openai.AsyncOpenAI) -> None:
    made = await api.responses.create(**ask())
    with pytest.raises(openai.BadRequestError, match="background"):
        await api.responses.cancel(made.id)
    done = await ended(api, await api.responses.create(**ask(background=True)))
    assert (await api.responses.cancel(done.id)).to_dict() == done.to_dict()


async def test_background_of_a_lost_gateway(
    served: World,
    api: openai.AsyncOpenAI,
    database: PostgresSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(background, "BEAT_S", 3600.0)
    served.pool.gate.shut()
    queued = await api.responses.create(**ask(background=True))
    await served.pool.gate.reached()
    await execute(database, "update comp_ai.responses set heartbeat_at = now() - interval '31 s'")
    seen = await api.responses.retrieve(queued.id)
    assert seen.status == "failed"
    assert seen.error is not None
    assert "gateway" in seen.error.message
    # Here it was only out of sight.
    served.pool.gate.open()
    assert (await ended(api, queued)).status in ("failed", "incomplete")
    await until(lambda: len([r for r in served.records if r.completion_tokens]) == 1)


async def test_bound_on_background_responses(database: PostgresSettings) -> None:
    config = {"max_background": 1}
    async with world(database=database, responses=config) as made, signed_in(made) as api:
        made.pool.gate.shut()
        first = await api.responses.create(**ask(background=True))
        with pytest.raises(openai.InternalServerError) as raised:
            await api.responses.create(**ask(background=True))
        assert (raised.value.status_code, raised.value.code) == (503, "unavailable")
        assert "retry-after" in raised.value.response.headers
        made.pool.gate.open()
        await ended(api, first)
        await ended(api, await api.responses.create(**ask(background=True)))


async def test_background_waits_for_room(
    database: PostgresSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "_FIRST_PAUSE_S", 0.01)
    limits = {"default": {"concurrency": 1}}
    async with world(SLOW, database=database, limits=limits) as made, signed_in(made) as api:
        first = await api.responses.create(**ask(background=True, max_output_tokens=20))
        second = await api.responses.create(**ask(background=True, max_output_tokens=2))
        assert (await ended(api, second)).output_text == "w0 w1 "
        assert (await ended(api, first)).status == "incomplete"
        refused = [row for row in made.records if row.error_code == "rate_limit_exceeded"]
        assert refused


async def test_background_outlives_the_close_of_its_gateway(database: PostgresSettings) -> None:
    async with world(SLOW, database=database) as made, signed_in(made) as api:
        queued = await api.responses.create(**ask(background=True, max_output_tokens=10))
    # Out of the block, so the gateway is closed.
    assert (
        await execute(database, "select status from comp_ai.responses where id = $1", queued.id)
        == "incomplete"
    )


async def test_background_that_finds_no_room_fails_when_its_gateway_closes(
    database: PostgresSettings,
) -> None:
    limits = {"default": {"requests_per_minute": 1}}
    async with world(database=database, limits=limits) as made, signed_in(made) as api:
        await api.responses.create(**ask(store=False))
        queued = await api.responses.create(**ask(background=True))
        await until(lambda: "rate_limit_exceeded" in {row.error_code for row in made.records})
    pool = build_pool(database, application_name="tests", max_size=1)
    response = await ResponseStore(pool, VAULT).find(queued.id, "user-1")
    await pool.close()
    assert (response["status"], response["error"]["code"]) == ("failed", "rate_limit_exceeded")
