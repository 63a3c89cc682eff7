"""Whatever is sent: a 4xx in OpenAI's form, nothing leaked, a row each, and we still answer."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from serve_app.completions.kinds import ENDPOINTS, Kind
from serve_app.settings import PostgresSettings
from tests.integration.doors import door
from tests.integration.fakes import AUTHORIZATION, KEY, World, client, until, world
from tests.integration.fuzzing import ANY_JSON, FUZZ, answered, assert_refused

CHAT = "/v1/chat/completions"
GOOD: dict[Kind, dict[str, Any]] = {
    Kind.CHAT: {"messages": [{"role": "user", "content": "Hi"}]},
    Kind.TEXT: {"prompt": "Hi"},
    Kind.EMBEDDINGS: {"input": "Hi"},
    Kind.RERANK: {"query": "a", "documents": ["a", "b"]},
    Kind.SCORE: {"text_1": "a", "text_2": "b"},
    Kind.TOKENIZE: {"prompt": "Hi"},
    Kind.DETOKENIZE: {"tokens": [1]},
}
KINDS = [kind for kind in GOOD if ENDPOINTS[kind].addresses]


async def _any_engine(scope: Scope, receive: Receive, send: Send) -> None:
    """Take whatever comes: what is tested is the way to the engine, not its own checks."""
    stream = (await Request(scope, receive).json()).get("stream") is True
    answer = b"data: [DONE]\n\n" if stream else b'{"choices":[]}'
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": answer})


def _models() -> list[dict[str, Any]]:
    tasks = {"small": "generate", "vectors": "embed"}
    return [{"name": name, "app": name, "task": task} for name, task in tasks.items()]


def _model_of(kind: Kind) -> str:
    return "small" if kind in (Kind.CHAT, Kind.TEXT, Kind.TOKENIZE, Kind.DETOKENIZE) else "vectors"


def _good(kind: Kind) -> dict[str, Any]:
    return {"model": _model_of(kind), **GOOD[kind]}


@asynccontextmanager
async def _open_world() -> AsyncIterator[World]:
    async with world(engine_app=_any_engine, models=_models(), max_body_bytes=200_000) as served:
        yield served


async def _still_answers(served: World, http: httpx.AsyncClient) -> None:
    before = len(served.records)
    assert (await http.post(CHAT, json=_good(Kind.CHAT))).status_code == 200
    assert not any(record.status >= 500 for record in served.records)
    await served.quiet(records=before + 1)


# Bodies that are wrong in a known way.


def _with(kind: Kind, raw_field: bytes) -> bytes:
    return orjson.dumps(_good(kind))[:-1] + b"," + raw_field + b"}"


def _broken(kind: Kind) -> Iterator[tuple[str, bytes]]:
    good = orjson.dumps(_good(kind))
    yield "empty", b""
    yield "truncated", good[:-1]
    yield "truncated in a text", good[: good.rindex(b'"')]
    yield "two objects", good + good
    yield "an array", b"[" + good + b"]"
    yield "a number", b"1"
    yield "deep arrays", b"[" * 100_000
    yield "deep objects", b'{"a":' * 30_000 + b"1" + b"}" * 30_000
    yield "deep field", _with(kind, b'"user":' + b"[" * 600 + b"]" * 600)
    yield "NaN", _with(kind, b'"seed":NaN')
    yield "infinity", _with(kind, b'"seed":-Infinity')
    yield "beyond a double", _with(kind, b'"seed":1e999')
    yield "a field twice", _with(kind, b'"model":"absent"')
    yield "an inner field twice", _with(kind, b'"user":{"a":1,"a":2}')
    yield "UTF-8 cut short", _with(kind, b'"user":"\xc3"')
    yield "overlong UTF-8", _with(kind, b'"user":"\xc0\xaf"')
    yield "UTF-8 of a surrogate", _with(kind, b'"user":"\xed\xa0\x80"')
    yield "a lone surrogate", _with(kind, b'"user":"\\ud800"')
    yield "UTF-16", json.dumps(_good(kind)).encode("utf-16")
    yield "a byte order mark", b"\xef\xbb\xbf" + good
    yield "a raw NUL", _with(kind, b'"user":"a\x00b"')
    yield "a raw newline in a text", _with(kind, b'"user":"a\nb"')
    yield "single quotes", good.replace(b'"', b"'")
    yield "a comment", b"/* hunter2 */" + good
    yield "gzip without saying so", gzip.compress(good)
    yield "10 MB", _with(kind, b'"user":"' + b"x" * 10_000_000 + b'"')
    yield "an unknown field", _with(kind, b'"hunter3":1')
    yield "a field of no name", _with(kind, b'"":1')
    yield "a field with a long name", _with(kind, b'"' + b"y" * 100_000 + b'":1')
    yield "a NUL in the model", orjson.dumps({**_good(kind), "model": "a\x00b"})
    yield "a long model", orjson.dumps({**_good(kind), "model": "z" * 100_000})
    yield "no model", orjson.dumps(GOOD[kind])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.route)
async def test_broken_bodies(kind: Kind) -> None:
    async with _open_world() as served, client(served) as http:
        bodies = dict(_broken(kind))
        for number, (name, body) in enumerate(bodies.items(), 1):
            answer = await http.post(ENDPOINTS[kind].addresses[0], content=body)
            assert_refused(answer.status_code, answer.headers["content-type"], answer.content)
            await until(lambda wanted=number: len(served.records) == wanted)  # type: ignore[misc]
            assert served.records[-1].status == answer.status_code, name
        await _still_answers(served, http)


# Bodies that nobody thought of.


async def _hunt(served: World, hunt: Any) -> None:
    """Run `hunt` in a thread: the gateway serves in this one."""
    with httpx.Client(base_url=served.url, headers=AUTHORIZATION, timeout=20) as http:
        await asyncio.to_thread(hunt, http)
    async with client(served) as again:
        await _still_answers(served, again)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.route)
async def test_any_value_in_any_parameter(kind: Kind) -> None:
    address, names = ENDPOINTS[kind].addresses[0], sorted(ENDPOINTS[kind].parameters)

    def hunt(http: httpx.Client) -> None:
        @FUZZ
        @given(st.dictionaries(st.sampled_from(names), ANY_JSON, min_size=1, max_size=3))
        def examples(fields: dict[str, Any]) -> None:
            answered(http, address, orjson.dumps({**_good(kind), **fields}))

        examples()

    async with _open_world() as served:
        await _hunt(served, hunt)


_KEY_BODIES: dict[str, dict[str, Any]] = {
    "/v1/keys": {"name": "k", "note": "n", "models": ["small"], "limits": {"concurrency": 1}},
    "/v1/keys/{id}": {"name": "k", "expires_at": None},
    "/v1/keys/{id}/rotate": {"overlap_s": 1},
}


@pytest.mark.parametrize("address", _KEY_BODIES)
async def test_any_value_in_a_key(database: PostgresSettings, address: str) -> None:
    async with world(database=database, models=_models()) as served, client(served) as http:
        made = (await http.post("/v1/keys", json={"name": "k"})).json()
        path = address.replace("{id}", made["id"])
        names = sorted({*_KEY_BODIES["/v1/keys"], "expires_at", "permissions", "overlap_s", "x"})

        def hunt(sync: httpx.Client) -> None:
            @FUZZ
            @given(st.dictionaries(st.sampled_from(names), ANY_JSON, min_size=1, max_size=3))
            def examples(fields: dict[str, Any]) -> None:
                answered(sync, path, orjson.dumps({**_KEY_BODIES[address], **fields}))

            examples()

        with httpx.Client(base_url=served.url, headers=AUTHORIZATION, timeout=20) as sync:
            await asyncio.to_thread(hunt, sync)
        assert (await http.get("/v1/keys")).status_code == 200
        assert not any(record.status >= 500 for record in served.records)


async def test_bytes_flipped_put_in_and_taken_out() -> None:
    good = orjson.dumps(_good(Kind.CHAT) | {"stream": True, "max_tokens": 5, "stop": ["\\"]})
    edits = st.lists(
        st.tuples(st.integers(0, len(good) - 1), st.integers(0, 2), st.binary(max_size=3)),
        min_size=1,
        max_size=4,
    )

    def hunt(http: httpx.Client) -> None:
        @FUZZ
        @given(edits)
        def examples(made: list[tuple[int, int, bytes]]) -> None:
            body = bytearray(good)
            for place, taken, put in made:
                body[place : place + taken] = put
            answered(http, CHAT, bytes(body))

        examples()

    async with _open_world() as served:
        await _hunt(served, hunt)


# Requests that are no good HTTP, through the real nginx.


async def _raw(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(20):
            writer.write(request)
            return await reader.read()
    finally:
        writer.close()


def _request(
    *headers: bytes, line: bytes = b"POST /v1/chat/completions HTTP/1.1", body: bytes = b""
) -> bytes:
    head = [line, b"Host: x", b"Connection: close", f"Authorization: Bearer {KEY}".encode()]
    return b"\r\n".join([*head, *headers, b"", b""]) + body


_CHUNKED = b"Transfer-Encoding: chunked"
_ODD: dict[str, bytes] = {
    "no HTTP": b"hunter2\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 50 + b"\r\n\r\n",
    "an unknown version": _request(line=b"POST /v1/models HTTP/9.9"),
    "an unknown method": _request(line=b"HUNT /v1/models HTTP/1.1"),
    "TRACE": _request(line=b"TRACE /v1/models HTTP/1.1"),
    "PROPFIND": _request(line=b"PROPFIND /v1/models HTTP/1.1"),
    "a long address": _request(line=b"GET /v1/models/" + b"a" * 60_000 + b" HTTP/1.1"),
    "a NUL in the address": _request(line=b"GET /v1/models/%00 HTTP/1.1"),
    "an address that climbs": _request(line=b"GET /v1/../../etc/passwd HTTP/1.1"),
    "a bad escape": _request(line=b"GET /v1/models/%zz HTTP/1.1"),
    "bytes in the address": _request(line=b"GET /v1/models/\xff\xfe HTTP/1.1"),
    "no host": b"POST /v1/chat/completions HTTP/1.1\r\nConnection: close\r\n\r\n",
    "two hosts": _request(b"Host: y"),
    "two credentials": _request(b"Authorization: Bearer other"),
    "64 KiB of a header": _request(b"X-Big: " + b"x" * 65_536),
    "1,000 headers": _request(*(b"X-%d: %s" % (n, b"y" * 100) for n in range(1000))),
    "a header without a colon": _request(b"hunter2"),
    "a control character in a header": _request(b"User-Agent: \x01\x7f"),
    "bytes in a header": _request(b"Idempotency-Key: \xff\xfe"),
    "CONNECT": _request(line=b"CONNECT other:443 HTTP/1.1"),
    "OPTIONS of everything": _request(line=b"OPTIONS * HTTP/1.1"),
    "a NUL in a header": _request(b"X-Odd: a\x00b"),
    "two lengths": _request(b"Content-Length: 2", b"Content-Length: 3", body=b"{}"),
    "no number as length": _request(b"Content-Length: two", body=b"{}"),
    "a negative length": _request(b"Content-Length: -2", body=b"{}"),
    "a huge length": _request(b"Content-Length: 99999999999999999999", body=b"{}"),
    "length and chunks": _request(b"Content-Length: 2", _CHUNKED, body=b"0\r\n\r\n"),
    "an unknown transfer": _request(b"Transfer-Encoding: gzip", body=b"{}"),
    "a chunk of no size": _request(_CHUNKED, body=b"zz\r\n{}\r\n0\r\n\r\n"),
    "a chunk of a huge size": _request(_CHUNKED, body=b"fffffffffffffffff\r\n{}\r\n"),
    "a chunk that is too long": _request(_CHUNKED, body=b"1\r\n{}{}{}\r\n0\r\n\r\n"),
    "no body": _request(),
    "an odd type": _request(b"Content-Type: \xff/;;=", b"Content-Length: 2", body=b"{}"),
    "gzip": _request(b"Content-Encoding: gzip", b"Content-Length: 2", body=b"{}"),
    "expects the impossible": _request(b"Expect: hunter2", b"Content-Length: 2", body=b"{}"),
}


async def test_odd_requests_through_nginx() -> None:
    async with _open_world() as served:
        with door(served) as port:
            answers = {name: await _raw(port, request) for name, request in _ODD.items()}
        for name, answer in answers.items():
            head, _, body = answer.partition(b"\r\n\r\n")
            lines = head.decode("latin-1").lower().split("\r\n")
            assert lines[0].startswith("http/1.1 4"), (name, head)
            headers = dict(line.split(": ", 1) for line in lines[1:])
            assert_refused(int(lines[0].split()[1]), headers["content-type"], body)
            assert headers["x-request-id"], name
        async with client(served) as http:
            await _still_answers(served, http)


@pytest.mark.parametrize(
    "sent",
    [
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-Slow",
        _request(b"Content-Length: 100", body=b'{"model'),
        _request(_CHUNKED, body=b"9\r\n{"),
    ],
    ids=["headers", "body", "chunk"],
)
async def test_who_dawdles_is_cut_off_and_holds_nothing_behind_nginx(sent: bytes) -> None:
    async with _open_world() as served:
        with door(served, timeout="1s") as port:
            assert await _raw(port, sent) == b""
        assert served.records == []
        async with client(served) as http:
            await _still_answers(served, http)
