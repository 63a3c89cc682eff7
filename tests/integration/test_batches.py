"""Files and batches: OpenAI's own client, a real PostgreSQL, the real gateway and its path."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import httpx
import openai
import orjson
import pytest
from openai.types import Batch, FileObject
from starlette.types import Receive, Scope, Send

from serve_app.audit.act import Actor
from serve_app.batches.runner import BatchRunner, Pulse
from serve_app.fake_engine import FakeEngine, FakeEngineConfig
from serve_app.identity.api_keys import ApiKeyStore, KeyTerms
from serve_app.identity.principal import Permission
from serve_app.records import Outcome
from serve_app.settings import PostgresSettings
from serve_app.stored.sweeper import Sweeper
from tests.integration.conftest import PostgresServer
from tests.integration.fakes import AUTHORIZATION, FAST, KEY, World, principal, until, world
from tests.integration.locks import lock_awaited

PULSE = Pulse(look_s=0.05, claim_s=20.0, feed_s=0.02, drain_s=0.0)
CHAT = "/v1/chat/completions"
OTHER_KEY = "key-of-another"
_PATIENCE_S = 60.0


def chat(custom_id: str, content: str = "Hello", **body: Any) -> dict[str, Any]:
    """Return one line of a batch."""
    messages = [{"role": "user", "content": content}]
    asked = {"model": "small", "messages": messages, "max_tokens": 3, **body}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": asked}


def jsonl(*lines: Any) -> bytes:
    return b"".join(
        (line if isinstance(line, bytes) else orjson.dumps(line)) + b"\n" for line in lines
    )


def client_of(served: World, key: str = KEY) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0)


@pytest.fixture
async def served(database: PostgresSettings) -> AsyncIterator[World]:
    async with world(database=database) as made:
        made.authenticator.principals[OTHER_KEY] = principal("user-2")
        yield made


@pytest.fixture
async def ai(served: World) -> AsyncIterator[openai.AsyncOpenAI]:
    async with client_of(served) as made:
        yield made


@asynccontextmanager
async def running(*worlds: World, pulse: Pulse = PULSE) -> AsyncIterator[list[BatchRunner]]:
    """Run batches at the gateways of `worlds`."""
    runners = [BatchRunner(one.gateway, one.batches, pulse=pulse) for one in worlds]
    for runner in runners:
        runner.start()
    try:
        yield runners
    finally:
        for runner in runners:
            await runner.close()


async def upload(ai: openai.AsyncOpenAI, content: bytes) -> FileObject:
    return await ai.files.create(file=("in.jsonl", content), purpose="batch")


async def begin(ai: openai.AsyncOpenAI, *lines: Any, **more: Any) -> Batch:
    file = await upload(ai, jsonl(*lines))
    return await ai.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="24h", **more
    )


async def until_batch(
    ai: openai.AsyncOpenAI, batch_id: str, condition: Callable[[Batch], bool]
) -> Batch:
    # As a user's client does, where a busy machine answers 503 with a Retry-After.
    patient = ai.with_options(max_retries=3)
    async with asyncio.timeout(_PATIENCE_S):
        while not condition(batch := await patient.batches.retrieve(batch_id)):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return batch


async def ended(ai: openai.AsyncOpenAI, batch_id: str, status: str = "completed") -> Batch:
    final = {"completed", "failed", "expired", "cancelled"}
    batch = await until_batch(ai, batch_id, lambda b: b.status in final)
    assert batch.status == status, batch
    return batch


async def lines_of(ai: openai.AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    content = (await ai.files.content(file_id)).content
    return [orjson.loads(line) for line in content.splitlines()]


def said(line: dict[str, Any]) -> str:
    return str(line["response"]["body"]["choices"][0]["message"]["content"])


# The whole way.


async def test_a_batch_of_hundreds_comes_out_exact(
    served: World, ai: openai.AsyncOpenAI, connection: asyncpg.Connection
) -> None:
    wanted = {f"line-{n}": 1 + n % 7 for n in range(300)}
    lines = [chat(custom_id, max_tokens=tokens) for custom_id, tokens in wanted.items()]
    batch = await begin(ai, *lines, metadata={"job": "nightly"})
    assert (batch.status, batch.endpoint, batch.metadata) == (
        "validating",
        CHAT,
        {"job": "nightly"},
    )
    async with running(served):
        done = await ended(ai, batch.id)
    assert done.request_counts is not None
    assert done.request_counts.to_dict() == {"total": 300, "completed": 300, "failed": 0}
    assert done.model == "small"
    assert done.error_file_id is None
    assert done.in_progress_at
    assert done.finalizing_at
    assert done.completed_at
    results = await lines_of(ai, done.output_file_id)
    assert [line["custom_id"] for line in results] == list(wanted)
    for line in results:
        tokens = wanted[line["custom_id"]]
        assert said(line) == "".join(f"w{n} " for n in range(tokens))
        assert line["response"]["status_code"] == 200
        assert line["response"]["body"]["usage"]["completion_tokens"] == tokens
        assert line["error"] is None
    assert len({line["id"] for line in results}) == 300
    # Each passed the path: its record is found under the request id of the result.
    rows = {row.request_id: row for row in served.records if row.route == "chat.completions"}
    assert rows.keys() == {line["response"]["request_id"] for line in results}
    assert {row.outcome for row in rows.values()} == {Outcome.COMPLETED}
    assert {row.principal_id for row in rows.values()} == {"user-1"}
    # What stood in the database for it is gone.
    assert await connection.fetchval("select count(*) from comp_ai.batch_lines") == 0


async def test_results_with_errors_are_apart_from_the_good_ones(
    served: World, ai: openai.AsyncOpenAI
) -> None:
    batch = await begin(ai, chat("good"), chat("bad", max_tokens=0), chat("odd", no_such=1))
    async with running(served):
        done = await ended(ai, batch.id)
    assert done.request_counts is not None
    assert done.request_counts.to_dict() == {"total": 3, "completed": 1, "failed": 2}
    assert [line["custom_id"] for line in await lines_of(ai, done.output_file_id)] == ["good"]
    bad, odd = await lines_of(ai, done.error_file_id)
    assert (bad["custom_id"], bad["response"]["status_code"]) == ("bad", 400)
    assert bad["response"]["body"]["error"]["param"] == "max_tokens"
    assert odd["response"]["body"]["error"]["code"] == "unsupported_parameter"
    assert odd["error"] is None


async def test_batch_requests_stand_where_the_policy_puts_them(
    served: World, ai: openai.AsyncOpenAI
) -> None:
    seen = []
    opened = served.pool.open

    async def noted(model: Any, hint: Any) -> Any:
        seen.append((hint.principal_id, hint.standing.priority))
        return await opened(model, hint)

    served.pool.open = noted  # type: ignore[method-assign]
    batch = await begin(ai, chat("a"))
    async with running(served):
        await ended(ai, batch.id)
    assert seen == [("user-1", 100)]


async def run_one(served: World, ai: openai.AsyncOpenAI, url: Any, body: Any) -> Any:
    """Run a batch of one line; return the body of its answer."""
    file = await upload(ai, jsonl({"custom_id": "a", "method": "POST", "url": url, "body": body}))
    batch = await ai.batches.create(input_file_id=file.id, endpoint=url, completion_window="24h")
    async with running(served):
        done = await ended(ai, batch.id)
    [result] = await lines_of(ai, done.output_file_id)
    return result["response"]["body"]


async def test_text_completions_too(served: World, ai: openai.AsyncOpenAI) -> None:
    body = {"model": "small", "prompt": "Say", "max_tokens": 2}
    answer = await run_one(served, ai, "/v1/completions", body)
    assert answer["choices"][0]["text"] == "w0 w1 "


async def test_responses_too(served: World, ai: openai.AsyncOpenAI) -> None:
    body = {"model": "small", "input": "Say", "max_output_tokens": 2}
    answer = await run_one(served, ai, "/v1/responses", body)
    assert answer["usage"]["output_tokens"] == 2
    # Stored like any other, for its owner to come back to.
    assert (await ai.responses.retrieve(answer["id"])).output_text == "w0 w1 "


async def test_embeddings_too(database: PostgresSettings) -> None:
    models = [{"name": "vectors", "app": "model-vectors", "task": "embed"}]
    async with world(database=database, models=models) as served, client_of(served) as ai:
        body = {"model": "vectors", "input": ["one", "two"]}
        answer = await run_one(served, ai, "/v1/embeddings", body)
        assert [one["index"] for one in answer["data"]] == [0, 1]


# Files.


async def test_files_as_openai_has_them(ai: openai.AsyncOpenAI) -> None:
    content = bytes(range(256)) * 4096  # a megabyte, and more than one chunk
    file = await upload(ai, content)
    assert (file.object, file.bytes, file.purpose, file.filename, file.status) == (
        "file",
        len(content),
        "batch",
        "in.jsonl",
        "processed",
    )
    assert (await ai.files.content(file.id)).content == content
    assert await ai.files.retrieve(file.id) == file
    assert [f.id async for f in ai.files.list()] == [file.id]
    deleted = await ai.files.delete(file.id)
    assert (deleted.id, deleted.deleted) == (file.id, True)
    assert [f.id async for f in ai.files.list()] == []
    with pytest.raises(openai.NotFoundError):
        await ai.files.content(file.id)


async def test_files_come_in_pages_and_in_order(ai: openai.AsyncOpenAI) -> None:
    ids = [(await upload(ai, b"x")).id for _ in range(5)]
    assert [f.id async for f in ai.files.list(limit=2)] == ids[::-1]
    assert [f.id async for f in ai.files.list(limit=2, order="asc")] == ids
    assert [f.id async for f in ai.files.list(purpose="batch_output")] == []
    page = await ai.files.list(limit=2, after=ids[2])
    assert [f.id for f in page.data] == [ids[1], ids[0]]
    assert page.has_more is False


async def test_a_file_says_how_long_it_is_kept(
    ai: openai.AsyncOpenAI, connection: asyncpg.Connection
) -> None:
    policy = {"anchor": "created_at", "seconds": 7200}
    file = await ai.files.create(
        file=("in.jsonl", b"x"),
        purpose="batch",
        expires_after=policy,  # type: ignore[arg-type]
    )
    assert file.expires_at == file.created_at + 7200
    await connection.execute("update comp_ai.files set expires_at = now()")
    with pytest.raises(openai.NotFoundError):
        await ai.files.retrieve(file.id)


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"purpose": (None, "fine-tune"), "file": ("a", b"x")}, "purpose"),
        ({"file": ("a", b"x")}, "purpose"),
        ({"purpose": (None, "batch")}, "file"),
        ({"purpose": (None, "batch"), "file": ("a", b"")}, "file"),
        ({"purpose": (None, "batch"), "file": (None, "x")}, "file"),
        ({"purpose": (None, "batch"), "file": ("a", b"x"), "color": (None, "red")}, "color"),
        (
            {
                "purpose": (None, "batch"),
                "file": ("a", b"x"),
                "expires_after[anchor]": (None, "created_at"),
                "expires_after[seconds]": (None, "10"),
            },
            "expires_after.seconds",
        ),
    ],
)
async def test_wrong_uploads_are_refused_by_name(
    served: World, form: dict[str, Any], param: str
) -> None:
    async with httpx.AsyncClient(base_url=served.url, headers=AUTHORIZATION) as http:
        response = await http.post("/v1/files", files=form)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("application/json", b"{}"),
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=b", b"no boundary at all"),
        ("multipart/form-data; boundary=b", b"--b\r\nContent-Disposition: form-data\r\n\r\nx"),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\ncut',
        ),
    ],
)
async def test_broken_forms_are_refused(served: World, kind: str, content: bytes) -> None:
    headers = {**AUTHORIZATION, "content-type": kind}
    async with httpx.AsyncClient(base_url=served.url, headers=headers) as http:
        response = await http.post("/v1/files", content=content)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


async def test_uploads_are_bounded_by_file_and_by_principal(database: PostgresSettings) -> None:
    files = {"max_bytes": 100_000, "max_bytes_per_principal": 150_000}
    async with world(database=database, files=files) as served, client_of(served) as ai:
        served.authenticator.principals[OTHER_KEY] = principal("user-2")
        with pytest.raises(openai.APIStatusError) as too_large:
            await upload(ai, b"x" * 100_001)
        assert too_large.value.status_code == 413
        first = await upload(ai, b"x" * 100_000)
        with pytest.raises(openai.BadRequestError) as too_much:
            await upload(ai, b"x" * 50_001)
        assert too_much.value.code == "file_quota_exceeded"
        async with client_of(served, OTHER_KEY) as other:
            await upload(other, b"x" * 50_001)
        await ai.files.delete(first.id)
        await upload(ai, b"x" * 50_001)


async def test_uploads_at_once_do_not_pass_the_quota_together(database: PostgresSettings) -> None:
    files = {"max_bytes": 100_000, "max_bytes_per_principal": 150_000}
    async with world(database=database, files=files) as served, client_of(served) as ai:
        uploads = (upload(ai, b"x" * 100_000) for _ in range(8))
        outcomes = await asyncio.gather(*uploads, return_exceptions=True)
        assert Counter(type(outcome) for outcome in outcomes) == {
            FileObject: 1,
            openai.BadRequestError: 7,
        }


async def test_what_others_own_is_not_there(served: World, ai: openai.AsyncOpenAI) -> None:
    file = await upload(ai, jsonl(chat("a")))
    batch = await ai.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    async with client_of(served, OTHER_KEY) as other:
        for refused in (
            other.files.retrieve(file.id),
            other.files.delete(file.id),
            other.files.content(file.id),
            other.batches.retrieve(batch.id),
            other.batches.cancel(batch.id),
        ):
            with pytest.raises(openai.NotFoundError):
                await refused
        assert (await other.files.list()).data == []
        assert (await other.batches.list()).data == []
        with pytest.raises(openai.BadRequestError) as error:
            await other.batches.create(
                input_file_id=file.id, endpoint=CHAT, completion_window="24h"
            )
        assert error.value.param == "input_file_id"
    assert (await ai.batches.retrieve(batch.id)).status == "validating"


async def test_without_postgres_the_answer_is_503() -> None:
    async with world() as served, client_of(served) as ai:
        for call in (upload(ai, b"x"), ai.files.list(), ai.batches.list(), begin(ai, chat("a"))):
            with pytest.raises(openai.InternalServerError) as error:
                await call
            assert (error.value.status_code, error.value.code) == (503, "store_unavailable")
        async with running(served):
            await asyncio.sleep(0)


# Batches that are refused.


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"completion_window": "1h"}, "completion_window"),
        ({"endpoint": "/v1/images/edits"}, "endpoint"),
        ({"input_file_id": "file-0"}, "input_file_id"),
        ({"input_file_id": "a\x00b"}, None),
        ({"input_file_id": None}, "input_file_id"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
        ({"metadata": {"a": "x" * 513}}, "metadata"),
        ({"metadata": {"": "x"}}, "metadata"),
        ({"metadata": []}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, None),
        ({"output_expires_after": 5}, "output_expires_after"),
        ({"color": "red"}, "color"),
    ],
)
async def test_wrong_batches_are_refused_by_name(
    served: World, ai: openai.AsyncOpenAI, change: dict[str, Any], param: str | None
) -> None:
    file = await upload(ai, jsonl(chat("a")))
    body = {"completion_window": "24h", "endpoint": CHAT, "input_file_id": file.id, **change}
    async with httpx.AsyncClient(base_url=served.url, headers=AUTHORIZATION) as http:
        response = await http.post("/v1/batches", json=body)
    assert response.status_code == 400
    if param is not None:
        assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("kind", "content", "status"),
    [
        ("application/json", b"no JSON", 400),
        ("application/json", b"[]", 400),
        ("text/plain", b"{}", 415),
        ("application/json", b" " * 65_537, 413),
    ],
)
async def test_bodies_that_are_no_batch_are_refused(
    served: World, kind: str, content: bytes, status: int
) -> None:
    headers = {**AUTHORIZATION, "content-type": kind}
    async with httpx.AsyncClient(base_url=served.url, headers=headers) as http:
        response = await http.post("/v1/batches", content=content)
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"


async def test_bad_lines_fail_the_batch_with_their_numbers(
    served: World, ai: openai.AsyncOpenAI
) -> None:
    other = {**chat("i"), "url": "/v1/embeddings"}
    batch = await begin(
        ai,
        chat("a"),
        b"no JSON",
        b"[]",
        chat("a"),
        {**chat("e"), "method": "GET"},
        chat("f", stream=True),
        chat("g", model="unknown"),
        b"",
        {**chat("h"), "extra": 1},
        other,
        {**chat(""), "body": None},
        {**chat("k"), "body": None},
        {**chat("l"), "body": {}},
    )
    async with running(served):
        failed = await ended(ai, batch.id, "failed")
    assert failed.failed_at
    assert failed.errors is not None
    assert failed.errors.data is not None
    assert [(e.line, e.code, e.param) for e in failed.errors.data] == [
        (2, "invalid_json_line", None),
        (3, "invalid_json_line", None),
        (4, "duplicate_custom_id", "custom_id"),
        (5, "invalid_method", "method"),
        (6, "unsupported_parameter", "body.stream"),
        (7, "model_not_found", "body.model"),
        (9, "unknown_parameter", "extra"),
        (10, "invalid_url", "url"),
        (11, "invalid_custom_id", "custom_id"),
        (12, "invalid_request", "body"),
        (13, "missing_required_parameter", "body.model"),
    ]
    assert served.replica.counters.completion_tokens == 0


async def test_a_model_that_is_not_allowed_fails_like_an_unknown_one_and_is_audited(
    served: World, connection: asyncpg.Connection
) -> None:
    served.authenticator.principals[OTHER_KEY] = principal("user-2", models=frozenset({"big"}))
    async with client_of(served, OTHER_KEY) as other:
        batch = await begin(other, chat("a"), chat("b"), chat("c", model="unknown"))
        async with running(served):
            failed = await ended(other, batch.id, "failed")
    assert failed.errors is not None
    messages = {(error.message or "").replace("small", "unknown") for error in failed.errors.data}
    assert len(messages) == 1
    rows = await connection.fetch("select actor_id, action, target, after from comp_ai.audit_log")
    assert [tuple(row) for row in rows] == [
        ("user-2", "permission.refuse", "model:small", f'{{"batch":"{batch.id}"}}')
    ]


async def test_an_empty_file_fails(served: World, ai: openai.AsyncOpenAI) -> None:
    batch = await begin(ai, b"", b"  ")
    async with running(served):
        failed = await ended(ai, batch.id, "failed")
    assert failed.errors is not None
    assert failed.errors.data is not None
    assert [(e.line, e.code) for e in failed.errors.data] == [(None, "empty_file")]


async def test_a_file_deleted_before_the_beginning_fails(
    served: World, ai: openai.AsyncOpenAI
) -> None:
    batch = await begin(ai, chat("a"))
    await ai.files.delete(batch.input_file_id)
    async with running(served):
        failed = await ended(ai, batch.id, "failed")
    assert failed.errors is not None
    assert failed.errors.data is not None
    assert [e.code for e in failed.errors.data] == ["file_not_found"]


async def test_the_number_of_lines_and_of_batches_is_bounded(database: PostgresSettings) -> None:
    batches = {"max_lines": 3, "max_open_per_principal": 2}
    async with world(database=database, batches=batches) as served, client_of(served) as ai:
        much = await begin(ai, *(chat(str(n)) for n in range(4)))
        good = await begin(ai, *(chat(str(n)) for n in range(3)))
        with pytest.raises(openai.RateLimitError):
            await begin(ai, chat("a"))
        async with running(served):
            failed = await ended(ai, much.id, "failed")
            await ended(ai, good.id)
        assert failed.errors is not None
        assert failed.errors.data is not None
        assert [e.code for e in failed.errors.data] == ["too_many_requests"]
        await begin(ai, chat("a"))


async def test_batches_come_in_pages(ai: openai.AsyncOpenAI) -> None:
    ids = [(await begin(ai, chat("a"))).id for _ in range(5)]
    assert [b.id async for b in ai.batches.list(limit=2)] == ids[::-1]
    page = await ai.batches.list(limit=2, after=ids[2])
    assert [b.id for b in page.data] == [ids[1], ids[0]]
    async with httpx.AsyncClient(headers=AUTHORIZATION) as http:
        for limit in ("0", "101", "x", "-1", "9" * 5000):
            response = await http.get(f"{ai.base_url}batches", params={"limit": limit})
            assert response.status_code == 400


# Waiting, trying again, giving up.


async def test_a_limit_is_waited_for_and_not_run_against(database: PostgresSettings) -> None:
    limits = {"default": {"concurrency": 1}}
    async with world(database=database, limits=limits) as served, client_of(served) as ai:
        batch = await begin(ai, *(chat(str(n)) for n in range(6)))
        async with running(served):
            done = await ended(ai, batch.id)
        assert done.request_counts is not None
        assert done.request_counts.completed == 6
        rows = [row for row in served.records if row.route == "chat.completions"]
        refused = [row for row in rows if row.error_code == "rate_limit_exceeded"]
        # The first that were sent at once, and none after: one at a time from then on.
        assert len(rows) - len(refused) == 6
        assert len(refused) <= 16


async def test_an_engine_that_fails_is_asked_three_times(
    served: World, ai: openai.AsyncOpenAI
) -> None:
    batch = await begin(ai, chat("a", "[[drop_after=0]]"), chat("b"))
    async with running(served):
        done = await ended(ai, batch.id)
    [failed] = await lines_of(ai, done.error_file_id)
    assert (failed["custom_id"], failed["response"]["status_code"]) == ("a", 502)
    assert failed["response"]["body"]["error"]["code"] == "engine_error"
    assert [line["custom_id"] for line in await lines_of(ai, done.output_file_id)] == ["b"]
    tried = [row for row in served.records if row.request_id == f"{batch.id}.1"]
    assert len(tried) == 3


async def test_a_revoked_key_ends_what_it_began(
    served: World, ai: openai.AsyncOpenAI, connection: asyncpg.Connection
) -> None:
    keys = ApiKeyStore(served.database)
    by = Actor(id="root", kind="operator")
    _, key = await keys.create(KeyTerms(name="k"), owner="user-1", by=by)
    served.authenticator.principals[KEY] = principal(
        "user-1", api_key_id=key.id, permissions=frozenset({Permission.USER})
    )
    before = await begin(ai, chat("a"))
    async with running(served):
        await ended(ai, before.id)
    after = await begin(ai, chat("b"), chat("c"))
    await keys.revoke(key.id, by=by)
    async with running(served):
        done = await ended(ai, after.id)
    failed = await lines_of(ai, done.error_file_id)
    assert [(f["custom_id"], f["response"], f["error"]["code"]) for f in failed] == [
        ("b", None, "invalid_api_key"),
        ("c", None, "invalid_api_key"),
    ]
    assert done.output_file_id is None


# The bad day.


async def test_lines_go_on_where_a_dead_gateway_left_them(database: PostgresSettings) -> None:
    """Killed: nothing is given back, claims must end by themselves."""
    slow = FakeEngineConfig(time_to_first_token_s=0.01, time_per_token_s=0.001)
    claims_end = Pulse(look_s=0.05, claim_s=0.6, feed_s=0.02, drain_s=0.0)
    async with world(slow, database=database) as first, client_of(first) as ai:
        batch = await begin(ai, *(chat(str(n)) for n in range(200)))
        async with running(first, pulse=claims_end) as [runner]:
            await until_batch(ai, batch.id, lambda b: b.request_counts.completed >= 40)  # type: ignore[union-attr]
            await _kill(runner)
    async with world(slow, database=database) as second, client_of(second) as ai:
        async with running(second, pulse=claims_end):
            done = await ended(ai, batch.id)
        results = await lines_of(ai, done.output_file_id)
        assert [line["custom_id"] for line in results] == [str(n) for n in range(200)]
        assert done.request_counts is not None
        assert done.request_counts.to_dict() == {"total": 200, "completed": 200, "failed": 0}
        again = [row for row in second.records if row.route == "chat.completions"]
        assert len(again) <= 160


async def _kill(runner: BatchRunner) -> None:
    """End every task of a runner, and let none of them speak to PostgreSQL any more."""

    async def dead(*_args: Any) -> bool:
        return False

    runner._work.give_up = dead  # type: ignore[method-assign]
    await runner.close()


async def test_two_gateways_share_one_batch(database: PostgresSettings) -> None:
    async with (
        world(database=database) as first,
        world(database=database) as second,
        client_of(first) as ai,
    ):
        batches = [await begin(ai, *(chat(str(n)) for n in range(150))) for _ in range(2)]
        async with running(first, second):
            done = [await ended(ai, batch.id) for batch in batches]
        for batch in done:
            results = await lines_of(ai, batch.output_file_id)
            assert [line["custom_id"] for line in results] == [str(n) for n in range(150)]
        work = [
            sum(row.route == "chat.completions" for row in one.records) for one in (first, second)
        ]
        assert sum(work) == 300
        assert min(work) > 0
        files = [file.purpose async for file in ai.files.list()]
        assert Counter(files) == {"batch": 2, "batch_output": 2}


async def test_a_claim_that_was_lost_writes_nothing(
    served: World, ai: openai.AsyncOpenAI, connection: asyncpg.Connection
) -> None:
    """A gateway that slept through its claim comes back with an answer nobody waits for."""
    batch = await begin(ai, chat("a"), chat("b"))
    served.limits.gate.shut()
    async with running(served):
        await served.limits.gate.reached()
        taken = "update comp_ai.batch_lines set claim = gen_random_uuid() where number = 1"
        assert await connection.execute(taken) == "UPDATE 1"
        served.limits.gate.open()
        await until_batch(ai, batch.id, lambda b: b.request_counts.completed == 1)  # type: ignore[union-attr]
        state = "select state from comp_ai.batch_lines where number = 1"
        assert await connection.fetchval(state) == "running"
        await connection.execute("update comp_ai.batch_lines set ready_at = now() where number = 1")
        done = await ended(ai, batch.id)
    results = await lines_of(ai, done.output_file_id)
    assert [line["custom_id"] for line in results] == ["a", "b"]


async def test_closing_gives_the_lines_to_others_at_once(database: PostgresSettings) -> None:
    endless = FakeEngineConfig(time_to_first_token_s=600, time_per_token_s=0.0)
    async with (
        world(endless, database=database) as first,
        world(database=database) as second,
        client_of(second) as ai,
    ):
        batch = await begin(ai, chat("a"), chat("b"))
        long = Pulse(look_s=0.05, claim_s=3600, feed_s=0.02, drain_s=0.0)
        async with running(first, pulse=long):
            await until(lambda: first.replica.counters.requests_running == 2)
        async with running(second, pulse=long):
            done = await ended(ai, batch.id)
        assert done.request_counts is not None
        assert done.request_counts.completed == 2
        assert {row.outcome for row in first.records} == {Outcome.CANCELLED}


async def test_cancelling_keeps_what_is_done(database: PostgresSettings) -> None:
    batches = {"concurrency": 2}
    short = Pulse(look_s=0.05, claim_s=0.3, feed_s=0.02, drain_s=0.0)
    async with world(database=database, batches=batches) as served, client_of(served) as ai:
        lines = [chat("a"), chat("b"), *(chat(str(n), "[[stall_after=0]]") for n in range(50))]
        batch = await begin(ai, *lines)
        async with running(served, pulse=short):
            await until_batch(ai, batch.id, lambda b: b.request_counts.completed == 2)  # type: ignore[union-attr]
            cancelling = await ai.batches.cancel(batch.id)
            assert (cancelling.status, bool(cancelling.cancelling_at)) == ("cancelling", True)
            assert (await ai.batches.cancel(batch.id)).id == batch.id
            done = await ended(ai, batch.id, "cancelled")
        assert done.cancelled_at
        assert done.request_counts is not None
        assert done.request_counts.to_dict() == {"total": 52, "completed": 2, "failed": 50}
        kept = await lines_of(ai, done.output_file_id)
        assert [line["custom_id"] for line in kept] == ["a", "b"]
        dropped = await lines_of(ai, done.error_file_id)
        assert {line["error"]["code"] for line in dropped} == {"batch_cancelled"}
        assert served.replica.counters.requests_running == 0
        again = await ai.batches.cancel(batch.id)
        assert again.status == "cancelled"


async def test_cancelling_before_it_began_and_after_it_ended(
    served: World, ai: openai.AsyncOpenAI
) -> None:
    batch = await begin(ai, chat("a"))
    assert (await ai.batches.cancel(batch.id)).status == "cancelling"
    other = await begin(ai, chat("a"))
    async with running(served):
        done = await ended(ai, batch.id, "cancelled")
        await ended(ai, other.id)
    assert (done.output_file_id, done.error_file_id) == (None, None)
    with pytest.raises(openai.BadRequestError):
        await ai.batches.cancel(other.id)


async def test_a_batch_that_is_late_expires_with_what_is_done(
    database: PostgresSettings, connection: asyncpg.Connection
) -> None:
    batches = {"concurrency": 1}
    short = Pulse(look_s=0.05, claim_s=0.3, feed_s=0.02, drain_s=0.0)
    async with world(database=database, batches=batches) as served, client_of(served) as ai:
        batch = await begin(ai, chat("a"), *(chat(str(n), "[[stall_after=0]]") for n in range(5)))
        async with running(served, pulse=short):
            await until_batch(ai, batch.id, lambda b: b.request_counts.completed == 1)  # type: ignore[union-attr]
            await connection.execute("update comp_ai.batches set expires_at = now()")
            done = await ended(ai, batch.id, "expired")
        assert done.expired_at
        assert not done.completed_at
        assert [line["custom_id"] for line in await lines_of(ai, done.output_file_id)] == ["a"]
        late = await lines_of(ai, done.error_file_id)
        assert [line["error"]["code"] for line in late] == ["batch_expired"] * 5


class HeldEngine:
    """A fake engine that answers no chat until it is told to."""

    def __init__(self) -> None:
        self._app = FakeEngine(FAST).app()
        self.answer = asyncio.Event()
        self.chats = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("path") == CHAT:
            self.chats += 1
            await self.answer.wait()
        await self._app(scope, receive, send)


async def test_lines_that_wait_for_postgres_leave_users_their_connections(
    database: PostgresSettings, connection: asyncpg.Connection
) -> None:
    held = HeldEngine()
    many = {"concurrency": 12}
    async with (
        world(engine_app=held, database=database, batches=many) as served,
        client_of(served) as ai,
    ):
        stored = await ai.responses.create(model="small", input="Say", max_output_tokens=1)
        batch = await begin(ai, *(chat(f"line-{n}", max_tokens=1) for n in range(12)))
        async with running(served):
            await until(lambda: held.chats == 12)
            async with connection.transaction():
                await connection.execute("lock table comp_ai.batch_lines in exclusive mode")
                held.answer.set()
                # All have an answer: four wait for the lock, the others for their connections.
                assert set(await lock_awaited(database, sessions=4)) == {"tests-batches"}
                assert (await ai.responses.retrieve(stored.id)).output_text == "w0 "
            done = await ended(ai, batch.id)
    assert done.request_counts is not None
    assert done.request_counts.completed == 12


async def test_postgres_may_die_in_the_middle(own_server: PostgresServer) -> None:
    settings = own_server.embedded.settings()
    pulse = Pulse(look_s=0.05, claim_s=2.0, feed_s=0.02, drain_s=0.0)
    slow = FakeEngineConfig(time_to_first_token_s=0.02, time_per_token_s=0.001)
    async with world(slow, database=settings) as served, client_of(served) as ai:
        batch = await begin(ai, *(chat(str(n)) for n in range(150)))
        async with running(served, pulse=pulse):
            await until_batch(ai, batch.id, lambda b: b.request_counts.completed >= 20)  # type: ignore[union-attr]
            own_server.kill()
            await asyncio.to_thread(own_server.start)
            done = await _ended_through_trouble(ai, batch.id)
        results = await lines_of(ai, done.output_file_id)
        assert [line["custom_id"] for line in results] == [str(n) for n in range(150)]


async def _ended_through_trouble(ai: openai.AsyncOpenAI, batch_id: str) -> Batch:
    async with asyncio.timeout(_PATIENCE_S):
        while True:
            try:
                return await ended(ai, batch_id)
            except openai.InternalServerError:
                await asyncio.sleep(0.1)


async def test_old_files_and_batches_are_dropped(
    served: World, ai: openai.AsyncOpenAI, connection: asyncpg.Connection
) -> None:
    batch = await begin(ai, chat("a"))
    async with running(served):
        await ended(ai, batch.id)
    kept = await upload(ai, b"x")
    open_one = await begin(ai, chat("a"))
    await connection.execute("update comp_ai.files set expires_at = now() where id <> $1", kept.id)
    await connection.execute("update comp_ai.batches set keep_until = now()")
    assert await Sweeper(served.database).sweep() == 7  # three files with a chunk each, a batch
    assert [b.id async for b in ai.batches.list()] == [open_one.id]
    rows = await connection.fetch("select distinct file_id from comp_ai.file_chunks")
    assert [row["file_id"] for row in rows] == [kept.id]
