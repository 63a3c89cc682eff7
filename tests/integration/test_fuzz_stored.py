"""Odd input where something is kept: responses, files, batches. A 4xx in OpenAI's form, always."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import httpx
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from serve_app.completions.kinds import ENDPOINTS, Kind
from serve_app.fake_responses import FakeResponse
from serve_app.settings import PostgresSettings
from tests.integration.fakes import AUTHORIZATION, World, client, until, world
from tests.integration.fuzzing import ANY_JSON, FUZZ, answered, assert_refused

_RESPONSES = "/v1/responses"
_BATCHES = "/v1/batches"
_FILES = "/v1/files"
_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


async def _any_engine(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer whatever was asked with one word."""
    asked = await Request(scope, receive).json()
    made = FakeResponse({"model": "small", "request_id": asked.get("request_id")}, 1, 1)
    if asked.get("stream"):
        parts = [frame async for frame in made.frames(_words())]
    else:
        parts = [orjson.dumps(made.whole(["w0"]))]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"".join(parts)})


async def _words() -> AsyncIterator[str]:
    yield "w0"


async def _hunt(served: World, hunt: Any) -> None:
    """Run `hunt` in a thread: the gateway serves in this one."""
    with httpx.Client(base_url=served.url, headers=AUTHORIZATION, timeout=20) as http:
        await asyncio.to_thread(hunt, http)
    assert [r.error_code for r in served.records if r.status >= 500] == []


async def test_any_value_in_any_parameter_of_a_response(database: PostgresSettings) -> None:
    names = sorted(ENDPOINTS[Kind.RESPONSES].parameters)
    good = {"model": "small", "input": "Hi"}

    def hunt(http: httpx.Client) -> None:
        @FUZZ
        @given(st.dictionaries(st.sampled_from(names), ANY_JSON, min_size=1, max_size=3))
        def examples(fields: dict[str, Any]) -> None:
            answered(http, _RESPONSES, orjson.dumps({**good, **fields}))

        examples()

    async with world(engine_app=_any_engine, database=database) as served:
        await _hunt(served, hunt)


async def test_any_value_in_any_parameter_of_a_batch(database: PostgresSettings) -> None:
    names = ["input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after"]
    good = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}

    async with world(database=database) as served, client(served) as http:
        file = {"file": ("in.jsonl", b"{}"), "purpose": (None, "batch")}
        uploaded = (await http.post(_FILES, files=file)).json()["id"]

        def hunt(sync: httpx.Client) -> None:
            @FUZZ
            @given(st.dictionaries(st.sampled_from(names), ANY_JSON, min_size=1, max_size=3))
            def examples(fields: dict[str, Any]) -> None:
                body = orjson.dumps({**good, "input_file_id": uploaded, **fields})
                answered(sync, _BATCHES, body)

            examples()

        await _hunt(served, hunt)


async def test_any_lines_in_the_file_of_a_batch(database: PostgresSettings) -> None:
    """A batch of a file that is no good fails, and says in which lines."""
    async with world(database=database) as served:

        def hunt(http: httpx.Client) -> None:
            @FUZZ
            @given(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=4))
            def examples(lines: list[bytes]) -> None:
                _fails(http, b"\n".join(lines))

            examples()

        await _hunt(served, hunt)


def _fails(http: httpx.Client, content: bytes) -> None:
    file = {"file": ("in.jsonl", content), "purpose": (None, "batch")}
    uploaded = http.post(_FILES, files=file)
    assert uploaded.status_code == 200, uploaded.text
    asked = {
        "input_file_id": uploaded.json()["id"],
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
    }
    made = http.post(_BATCHES, json=asked)
    if made.status_code == 200:
        batch = made.json()
        assert batch["status"] in ("validating", "failed")
        if batch["status"] == "failed":
            assert batch["errors"]["data"]
        http.post(f"{_BATCHES}/{batch['id']}/cancel")
        return
    assert_refused(made.status_code, made.headers["content-type"], made.content)


_PART = b'--b\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
_PURPOSE = _PART % (b"purpose", b"", b"batch")
_FILE = _PART % (b"file", b'; filename="in.jsonl"', b"{}")
_END = b"--b--\r\n"
_UPLOADS = {
    "nothing": b"",
    "no parts": _END,
    "no file": _PURPOSE + _END,
    "no purpose": _FILE + _END,
    "another purpose": _PART % (b"purpose", b"", b"hunter3") + _FILE + _END,
    "a file as purpose": _PART % (b"purpose", b'; filename="p"', b"batch") + _FILE + _END,
    "a field as file": _PURPOSE + _PART % (b"file", b"", b"{}") + _END,
    "two files": _PURPOSE + _FILE + _FILE + _END,
    "an empty file": _PURPOSE + _PART % (b"file", b'; filename="x"', b"") + _END,
    "an unknown field": _PURPOSE + _FILE + _PART % (b"hunter3", b"", b"1") + _END,
    "no end": _PURPOSE + _FILE,
    "cut in a header": _PURPOSE + b"--b\r\nContent-Dispo",
    "a part of no name": _PURPOSE + _FILE + b"--b\r\n\r\nx\r\n" + _END,
    "another boundary": (_PURPOSE + _FILE + _END).replace(b"--b", b"--c"),
    "a long name": _PART % (b"n" * 100_000, b"", b"1") + _END,
    "2,000 fields": b"".join(_PART % (b"f%d" % n, b"", b"1") for n in range(2000)) + _END,
    "an expiry of words": _PURPOSE
    + _FILE
    + _PART % (b"expires_after[anchor]", b"", b"created_at")
    + _PART % (b"expires_after[seconds]", b"", b"soon")
    + _END,
    "bytes": bytes(range(256)) * 4,
}


@pytest.mark.parametrize("name", _UPLOADS)
async def test_odd_uploads(database: PostgresSettings, name: str) -> None:
    async with world(database=database) as served, client(served) as http:
        headers = {"content-type": "multipart/form-data; boundary=b"}
        answer = await http.post(_FILES, content=_UPLOADS[name], headers=headers)
        assert_refused(answer.status_code, answer.headers["content-type"], answer.content)
        await until(lambda: len(served.records) == 1)
        assert served.records[0].status == answer.status_code
        assert (await http.get(_FILES)).json()["data"] == []


async def test_any_name_in_an_address(database: PostgresSettings) -> None:
    places = [
        f"{_RESPONSES}/{{}}",
        f"{_RESPONSES}/{{}}/input_items",
        f"{_BATCHES}/{{}}",
        f"{_FILES}/{{}}",
        f"{_FILES}/{{}}/content",
    ]
    pages = st.dictionaries(st.sampled_from(["limit", "after", "order", "purpose"]), _TEXT)

    def hunt(http: httpx.Client) -> None:
        @FUZZ
        @given(st.sampled_from(places), _TEXT, pages)
        def examples(place: str, name: str, query: dict[str, str]) -> None:
            answer = http.get(place.format(quote(name, safe="") or "-"), params=query)
            if answer.status_code not in (200, 307):
                assert_refused(answer.status_code, answer.headers["content-type"], answer.content)
            for listed in (_BATCHES, _FILES):
                answer = http.get(listed, params=query)
                if answer.status_code != 200:
                    kind = answer.headers["content-type"]
                    assert_refused(answer.status_code, kind, answer.content)

        examples()

    async with world(engine_app=_any_engine, database=database) as served:
        await _hunt(served, hunt)
