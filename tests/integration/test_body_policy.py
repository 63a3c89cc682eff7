"""What the records hold of prompts and answers: by policy, by key, and by what the caller asks."""

from __future__ import annotations

from typing import Any

import httpx
import orjson
import pytest

from serve_app.config import Bodies
from serve_app.records import RequestRecord
from serve_app.settings import PostgresSettings
from tests.integration.fakes import World, client, principal, world

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MARKER = "MARKER"
NAME = "x-comp-ai-bodies"


def ask(path: str = CHAT, **more: Any) -> dict[str, Any]:
    prompt: dict[str, Any] = {
        CHAT: {"messages": [{"role": "user", "content": MARKER}], "max_tokens": 3},
        TEXT: {"prompt": MARKER, "max_tokens": 3},
        RESPONSES: {"input": MARKER, "max_output_tokens": 3},
    }[path]
    return {"model": "small", **prompt, **more}


async def recorded(
    served: World, http: httpx.AsyncClient, path: str = CHAT, status: int = 200, **request: Any
) -> RequestRecord:
    before = len(served.records)
    response = await http.post(path, **request)
    assert response.status_code == status, response.text
    await served.quiet(records=before + 1)
    return served.records[-1]


def kept(row: RequestRecord) -> tuple[str | None, bool, bool]:
    """Return the word, and whether the texts of request and answer are there."""
    return row.bodies, MARKER in (row.request_body or ""), bool(row.response_text)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_each_word_keeps_what_it_says(path: str, stream: bool) -> None:
    body = ask(path, stream=stream)
    for word, texts in {"full": True, "redacted": True, "metadata": False, "none": False}.items():
        async with world(bodies=word) as served, client(served) as http:
            row = await recorded(served, http, path, json=body)
            assert kept(row) == (word, texts, texts)
            shape = row.request_body if word == "metadata" else None
            if shape is not None:
                assert orjson.loads(shape)["max_tokens"] == 3
            elif not texts:
                assert row.request_body is None


async def test_a_role_and_a_key_are_kept_less_of() -> None:
    bodies = {"roles": {"doctor": "metadata"}}
    async with world(bodies=bodies) as served, client(served) as http:
        people = served.authenticator.principals
        people["doctor"] = principal("dr-1", roles=frozenset({"doctor"}))
        people["quiet"] = principal("user-2", bodies=Bodies.NONE)
        for key, word in {"doctor": "metadata", "quiet": "none"}.items():
            headers = {"authorization": f"Bearer {key}"}
            assert (await recorded(served, http, json=ask(), headers=headers)).bodies == word
            me = await http.get("/v1/me", headers=headers)
            assert me.json()["bodies"] == {"small": word}
        assert (await http.get("/v1/me")).json()["bodies"] == {"small": "full"}


async def test_a_caller_may_ask_for_less_and_not_for_more() -> None:
    async with world(bodies="redacted") as served, client(served) as http:
        for word, kept_then in {
            "none": "none",
            "metadata": "metadata",
            "redacted": "redacted",
            "full": "redacted",
        }.items():
            row = await recorded(served, http, json=ask(), headers={NAME: word})
            assert row.bodies == kept_then
        row = await recorded(served, http, status=400, json=ask(), headers={NAME: "some"})
        assert kept(row) == (None, False, False)


@pytest.mark.parametrize("path", [CHAT, TEXT, RESPONSES])
async def test_store_false_keeps_nothing_and_the_engine_is_not_told(
    path: str, database: PostgresSettings
) -> None:
    async with world(database=database) as served, client(served) as http:
        row = await recorded(served, http, path, json=ask(path, store=False))
        assert kept(row) == ("none", False, False)
        sent = served.replicas[0].engine.asked[-1]
        assert sent.get("store") in ((False,) if path == RESPONSES else (None,))
        assert (await recorded(served, http, path, json=ask(path))).bodies == "full"


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_store_true_is_refused_where_nothing_can_be_retrieved(path: str) -> None:
    async with world() as served, client(served) as http:
        response = await http.post(path, json=ask(path, store=True))
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "unsupported_parameter")
        assert error["param"] == "store"


async def test_a_refusal_is_kept_no_longer_than_its_request_would_be() -> None:
    async with world() as served, client(served) as http:
        unknown = ask(model="unknown", store=False)
        assert kept(await recorded(served, http, status=404, json=unknown))[:2] == ("none", False)
        no_model = {**ask(store=False), "model": None}
        assert kept(await recorded(served, http, status=400, json=no_model))[:2] == ("none", False)
        broken = {"content": f'{{"messages": "{MARKER}'}
        quiet = {NAME: "metadata", "content-type": "application/json"}
        row = await recorded(served, http, status=400, headers=quiet, **broken)
        assert (row.bodies, row.request_body) == ("metadata", None)


async def test_a_response_is_stored_only_where_it_is_kept_in_full(
    database: PostgresSettings,
) -> None:
    async with world(database=database) as served, client(served) as http:
        for word in ("none", "metadata", "redacted"):
            made = await http.post(RESPONSES, json=ask(RESPONSES), headers={NAME: word})
            assert (await http.get(f"{RESPONSES}/{made.json()['id']}")).status_code == 404
            stored = ask(RESPONSES, store=True)
            refused = await http.post(RESPONSES, json=stored, headers={NAME: word})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "store")


async def test_a_background_response_is_kept_like_the_request_for_it(
    database: PostgresSettings,
) -> None:
    async with world(database=database) as served, client(served) as http:
        await http.post(RESPONSES, json=ask(RESPONSES, background=True))
        await served.quiet(records=2)
        assert {row.bodies for row in served.records} == {"full"}
        assert [bool(row.response_text) for row in served.records].count(True) == 1


@pytest.mark.parametrize("word", ["none", "metadata", "redacted"])
async def test_no_answer_is_kept_for_a_retry_that_may_not_be(
    word: str, database: PostgresSettings
) -> None:
    async with world(database=database) as served, client(served) as http:
        headers = {"idempotency-key": "once", NAME: word}
        response = await http.post(TEXT, json=ask(TEXT), headers=headers)
        assert response.status_code == 400
        assert f"bodies: {word}" in response.json()["error"]["message"]
