"""Every endpoint of the table over real HTTP, in front of a replica with a fake engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import orjson
import pytest

from serve_app.records import Outcome
from tests.integration.fakes import KEY, World, client, principal, world

MODELS = [
    {
        "name": "small",
        "app": "model-small",
        "max_tokens": 2000,
        "aliases": ["gpt-4o-mini"],
        "priority": True,
    },
    {"name": "vectors", "app": "model-vectors", "task": "embed"},
    {"name": "judge", "app": "model-judge", "task": "score"},
]


@pytest.fixture
async def served() -> AsyncIterator[World]:
    """A gateway with a model for each task."""
    async with world(models=MODELS) as made:
        yield made


@pytest.fixture
async def http(served: World) -> AsyncIterator[httpx.AsyncClient]:
    """A client that is signed in at `served`."""
    async with client(served) as made:
        yield made


def error_of(response: httpx.Response) -> dict[str, Any]:
    """Return the error object of a refusal."""
    error: dict[str, Any] = response.json()["error"]
    return error


async def test_embeddings_through_the_openai_client(served: World) -> None:
    async with openai.AsyncOpenAI(api_key=KEY, base_url=f"{served.url}/v1") as api:
        # The client asks for base64 and turns it back into numbers.
        made = await api.embeddings.create(model="vectors", input=["a b", "c"], dimensions=4)
    assert [len(one.embedding) for one in made.data] == [4, 4]
    assert made.usage.prompt_tokens == 3
    row = await served.the_record()
    assert (row.route, row.model, row.outcome) == ("embeddings", "vectors", Outcome.COMPLETED)
    assert (row.prompt_tokens, row.completion_tokens) == (3, 0)
    assert (row.stream, row.finish_reason, row.response_text) == (False, None, "")
    served.assert_accounts_add_up()


@pytest.mark.parametrize("address", ["/v1/rerank", "/v2/rerank", "/rerank"])
@pytest.mark.parametrize("model", ["judge", "vectors"])
async def test_rerank(served: World, http: httpx.AsyncClient, address: str, model: str) -> None:
    body = {"model": model, "query": "red car", "documents": ["blue", "red car", "a car"]}
    response = await http.post(address, json={**body, "top_n": 2})
    assert response.status_code == 200
    assert [result["index"] for result in response.json()["results"]] == [1, 2]
    row = await served.the_record()
    assert (row.route, row.prompt_tokens, row.completion_tokens) == ("rerank", 11, 0)
    assert orjson.loads(row.response_text or "") == response.json()["results"]
    served.assert_accounts_add_up()


@pytest.mark.parametrize("address", ["/v1/score", "/score"])
async def test_score(served: World, http: httpx.AsyncClient, address: str) -> None:
    body = {"model": "judge", "text_1": "red car", "text_2": ["red car", "blue"]}
    response = await http.post(address, json=body)
    assert [one["score"] for one in response.json()["data"]] == [1.0, 0.0]
    row = await served.the_record()
    assert (row.route, row.prompt_tokens) == ("score", 7)
    served.assert_accounts_add_up()


@pytest.mark.parametrize("base", ["/v1", ""])
@pytest.mark.parametrize("model", ["small", "vectors", "judge"])
async def test_tokenize_and_detokenize(
    served: World, http: httpx.AsyncClient, base: str, model: str
) -> None:
    tokens = await http.post(f"{base}/tokenize", json={"model": model, "prompt": '! "'})
    assert (tokens.status_code, tokens.json()["tokens"]) == (200, [33, 34])
    text = await http.post(f"{base}/detokenize", json={"model": model, "tokens": [33, 34]})
    assert (text.status_code, text.json()) == (200, {"prompt": "w33 w34"})
    await served.quiet(records=2)
    assert [row.route for row in served.records] == ["tokenize", "detokenize"]
    assert [row.response_text for row in served.records] == ["", "w33 w34"]
    assert {(row.prompt_tokens, row.completion_tokens) for row in served.records} == {(0, 0)}
    served.assert_accounts_add_up()


async def test_a_conversation_is_tokenized(served: World, http: httpx.AsyncClient) -> None:
    body = {"model": "small", "messages": [{"role": "user", "content": "! !"}]}
    assert (await http.post("/v1/tokenize", json=body)).json()["count"] == 2
    await served.quiet()


@pytest.mark.parametrize(
    ("address", "model", "serves"),
    [
        ("/v1/embeddings", "small", "chat.completions"),
        ("/v1/chat/completions", "vectors", "embeddings"),
        ("/v1/completions", "judge", "rerank"),
    ],
)
async def test_a_model_for_something_else_is_a_refusal(
    served: World, http: httpx.AsyncClient, address: str, model: str, serves: str
) -> None:
    response = await http.post(address, json={"model": model})
    assert response.status_code == 400
    assert error_of(response)["param"] == "model"
    assert f"`{serves}`" in error_of(response)["message"]
    assert (await served.the_record()).outcome is Outcome.REFUSED


@pytest.mark.parametrize(
    ("address", "body", "param"),
    [
        ("/v1/embeddings", {"model": "vectors", "input": "a", "stream": True}, "stream"),
        ("/v1/rerank", {"model": "judge", "return_documents": True}, "return_documents"),
        ("/v1/tokenize", {"model": "small", "prompt": "a", "chat_template": "x"}, "chat_template"),
    ],
)
async def test_what_is_not_honoured_is_refused_by_name(
    served: World, http: httpx.AsyncClient, address: str, body: dict[str, Any], param: str
) -> None:
    response = await http.post(address, json=body)
    assert response.status_code == 400
    assert (error_of(response)["code"], error_of(response)["param"]) == (
        "unsupported_parameter",
        param,
    )
    await served.quiet()


async def test_what_the_engine_did_not_finish_costs_nothing(
    served: World, http: httpx.AsyncClient
) -> None:
    body = {"model": "vectors", "input": "a [[stall_after=0]]"}
    with pytest.raises(httpx.ReadTimeout):
        await http.post("/v1/embeddings", json=body, timeout=0.3)
    row = await served.the_record()
    assert (row.outcome, row.prompt_tokens) == (Outcome.CANCELLED, 0)
    served.assert_accounts_add_up()


@pytest.mark.parametrize("address", ["/v1/embeddings", "/tokenize", "/rerank"])
async def test_another_method_is_405(served: World, http: httpx.AsyncClient, address: str) -> None:
    assert (await http.get(address)).status_code == 405
    await served.quiet()


# Names.


async def test_an_alias_is_the_model_under_another_name(served: World) -> None:
    async with openai.AsyncOpenAI(api_key=KEY, base_url=f"{served.url}/v1") as api:
        chat = await api.chat.completions.create(
            model="gpt-4o-mini", messages=[{"role": "user", "content": "Hi"}], max_tokens=2
        )
        # As OpenAI names the snapshot that an alias leads to.
        assert chat.model == "small"
        listed = [(model.id, model.to_dict()["root"]) async for model in api.models.list()]
        assert listed == [
            ("small", "small"),
            ("gpt-4o-mini", "small"),
            ("vectors", "vectors"),
            ("judge", "judge"),
        ]
        assert (await api.models.retrieve("gpt-4o-mini")).id == "gpt-4o-mini"
    await served.quiet(records=3)
    assert served.records[0].model == "small"
    assert '"model":"small"' in served.lines.getvalue().splitlines()[0].replace(" ", "")


async def test_an_alias_of_a_model_that_may_not_be_used_is_unknown(
    served: World, http: httpx.AsyncClient
) -> None:
    only = principal("user-1", models=frozenset({"vectors"}))
    served.authenticator.principals[KEY] = only
    response = await http.post("/v1/completions", json={"model": "gpt-4o-mini", "prompt": "a"})
    assert response.status_code == 404
    assert "small" not in error_of(response)["message"]
    listed = (await http.get("/v1/models")).json()["data"]
    assert [card["id"] for card in listed] == ["vectors"]
    assert (await http.get("/v1/models/gpt-4o-mini")).status_code == 404
    await served.quiet(records=3)


async def test_the_engine_is_asked_by_its_own_name() -> None:
    models = [{"name": "small", "app": "model-small", "engine_name": "small-lora"}]
    async with world(models=models, default_model="small") as served, client(served) as http:
        response = await http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
        assert response.json()["model"] == "small-lora"
        assert (await served.the_record()).model == "small"


async def test_without_a_default_a_model_must_be_named(
    served: World, http: httpx.AsyncClient
) -> None:
    response = await http.post("/v1/completions", json={"prompt": "a"})
    assert (response.status_code, error_of(response)["param"]) == (400, "model")
    await served.quiet()


# Priority.


async def test_priority_reaches_queue_and_engine(served: World, http: httpx.AsyncClient) -> None:
    body = {"model": "small", "prompt": "a", "max_tokens": 1}
    assert (await http.post("/v1/completions", json={**body, "priority": 7})).status_code == 200
    assert (await http.post("/v1/completions", json=body)).status_code == 200
    refused = await http.post("/v1/completions", json={**body, "priority": -1})
    assert (refused.status_code, error_of(refused)["param"]) == (400, "priority")
    await served.quiet(records=3)
    assert [hint.standing.priority for hint in served.pool.hints] == [7, 0]
    assert [asked.get("priority") for asked in served.replica.engine.asked] == [7, 0]


# Caps.


@pytest.mark.parametrize(
    ("address", "body", "param"),
    [
        ("/v1/completions", {"model": "small", "prompt": "a", "n": 3}, "n"),
        ("/v1/completions", {"model": "small", "prompt": ["a", "b"], "n": 2}, "n"),
        ("/v1/completions", {"model": "small", "prompt": ["a"] * 4}, "prompt"),
        ("/v1/completions", {"model": "small", "prompt": "a", "best_of": 2}, "best_of"),
        ("/v1/embeddings", {"model": "vectors", "input": ["a"] * 4}, "input"),
        ("/v1/rerank", {"model": "judge", "query": "q", "documents": ["a"] * 4}, "documents"),
        ("/v1/score", {"model": "judge", "text_1": "q", "text_2": ["a"] * 4}, None),
        ("/v1/chat/completions", {"model": "small", "messages": [{}] * 3}, "messages"),
        ("/v1/completions", {"model": "small", "prompt": "a", "stop": ["a"] * 3}, "stop"),
    ],
)
async def test_over_a_cap_of_the_policy(
    address: str, body: dict[str, Any], param: str | None
) -> None:
    caps = {"max_n": 2, "max_choices": 3, "max_prompts": 3, "max_messages": 2, "max_stop": 2}
    async with world(models=MODELS, caps=caps) as served, client(served) as http:
        response = await http.post(address, json=body)
        assert response.status_code == 400
        assert error_of(response)["param"] == param
        row = await served.the_record()
        assert (row.outcome, row.replica_id) == (Outcome.REFUSED, None)


async def test_the_cap_holds_where_no_number_is_named() -> None:
    models = [{"name": "small", "app": "model-small", "max_tokens": 5}]
    async with world(models=models) as served, client(served) as http:
        messages = [{"role": "user", "content": "Hi"}]
        body = {"model": "small", "messages": messages}
        answer = (await http.post("/v1/chat/completions", json=body)).json()
        assert answer["usage"]["completion_tokens"] == 5
        await served.quiet()


async def test_the_engine_is_sent_to_no_address(served: World, http: httpx.AsyncClient) -> None:
    part = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}
    body = {"model": "small", "messages": [{"role": "user", "content": [part]}]}
    response = await http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert error_of(response)["param"] == "messages.0.content.0.image_url"
    assert (await served.the_record()).replica_id is None
