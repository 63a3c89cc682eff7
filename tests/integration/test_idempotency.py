"""Idempotency-Key over real HTTP, with a real PostgreSQL: what a client that asks again gets."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import openai
import pytest

from serve_app.database import connect
from serve_app.errors import LogUnavailable, ModelNotReady, RequestError
from serve_app.fake_engine import FakeEngineConfig
from serve_app.records import Outcome
from serve_app.settings import PostgresSettings
from tests.integration.conftest import PostgresServer
from tests.integration.fakes import (
    FAST,
    KEY,
    World,
    client,
    parse_events,
    principal,
    until,
    world,
)
from tests.integration.locks import lock_awaited

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"
RESPONSES = "/v1/responses"
MODELS = [
    {"name": "small", "app": "model-small", "max_tokens": 2000},
    {"name": "vectors", "app": "model-vectors", "task": "embed"},
]
BODY = b'{"model": "small", "prompt": "Hi"}'
NAMED = {"Idempotency-Key": "8e03978e-40d5-43dd-bc93-6894a57f9324"}
SLOW = FakeEngineConfig(time_to_first_token_s=0, time_per_token_s=0.01)
SLOW_START = FakeEngineConfig(time_to_first_token_s=3600, time_per_token_s=0)
ALL_ROWS = "select * from comp_ai.idempotency_keys"

BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {"model": "small", "messages": [{"role": "user", "content": "Hi"}]}),
    "chat-stream": (
        CHAT,
        {"model": "small", "messages": [{"role": "user", "content": "Hi"}], "stream": True},
    ),
    "text": (TEXT, {"model": "small", "prompt": "Hi"}),
    "text-stream": (TEXT, {"model": "small", "prompt": "Hi", "stream": True}),
    "response": (RESPONSES, {"model": "small", "input": "Hi"}),
    "response-stream": (RESPONSES, {"model": "small", "input": "Hi", "stream": True}),
    "embeddings": (EMBEDDINGS, {"model": "vectors", "input": ["one two", "three"]}),
}


def ask(text: str = "one two three", **more: Any) -> dict[str, Any]:
    """Return a body for TEXT."""
    return {"model": "small", "prompt": text, "max_tokens": 5, **more}


@pytest.fixture
async def served(database: PostgresSettings) -> AsyncIterator[World]:
    """A gateway that is as fast as it can be."""
    async with world(database=database, models=MODELS) as made:
        yield made


@pytest.fixture
async def http(served: World) -> AsyncIterator[httpx.AsyncClient]:
    """A client that is signed in at `served`."""
    async with client(served) as made:
        yield made


def code_of(response: httpx.Response) -> str:
    """Return the code of a refusal."""
    return str(response.json()["error"]["code"])


def generated(served: World) -> int:
    """Return how many requests were given a lease."""
    return sum(row.replica_id is not None for row in served.records)


async def released(connection: asyncpg.Connection) -> None:
    """Return once no key is held."""
    async with asyncio.timeout(20):
        while await connection.fetch(ALL_ROWS):  # noqa: ASYNC110 - PostgreSQL's state
            await asyncio.sleep(0.005)


# A request that is finished.


@pytest.mark.parametrize("name", BODIES)
async def test_retry_gets_the_same_answer(
    served: World, http: httpx.AsyncClient, name: str
) -> None:
    path, body = BODIES[name]
    first = await http.post(path, json=body, headers=NAMED)
    assert first.status_code == 200
    assert "idempotent-replayed" not in first.headers
    for _ in range(2):
        again = await http.post(path, json=body, headers=NAMED)
        assert (again.status_code, again.content) == (200, first.content)
        assert again.headers["content-type"] == first.headers["content-type"]
        assert again.headers["idempotent-replayed"] == "true"
        assert "total;dur=" in again.headers["server-timing"]
    await served.quiet(records=3)
    made, *replays = served.records
    assert made.prompt_tokens > 0
    for row in replays:
        assert (row.outcome, row.status, row.error_code) == (Outcome.COMPLETED, 200, None)
        assert (row.prompt_tokens, row.completion_tokens, row.replica_id) == (0, 0, None)
        assert (row.route, row.model, row.stream) == (made.route, made.model, made.stream)
    assert len(served.limits.reserved) == generated(served) == 1
    served.assert_accounts_add_up()


async def test_response_in_the_background_is_made_once(
    served: World, http: httpx.AsyncClient
) -> None:
    body = {"model": "small", "input": "Hi", "background": True}
    first = await http.post(RESPONSES, json=body, headers=NAMED)
    again = await http.post(RESPONSES, json=body, headers=NAMED)
    assert first.status_code == 200
    assert (again.content, again.headers["idempotent-replayed"]) == (first.content, "true")
    await served.quiet(records=3)  # both requests, and the one that was made of the first
    assert generated(served) == 1


async def test_without_a_key_each_request_is_generated(
    served: World, http: httpx.AsyncClient
) -> None:
    for _ in range(2):
        assert "idempotent-replayed" not in (await http.post(TEXT, json=ask())).headers
    await served.quiet(records=2)
    assert generated(served) == 2


async def test_key_in_quotes_is_the_same_key(served: World, http: httpx.AsyncClient) -> None:
    first = await http.post(TEXT, json=ask(), headers={"Idempotency-Key": '"one"'})
    again = await http.post(TEXT, json=ask(), headers={"Idempotency-Key": "one"})
    assert again.content == first.content


async def test_openai_client_gets_the_same_answer(served: World) -> None:
    async with openai.AsyncOpenAI(api_key=KEY, base_url=f"{served.url}/v1") as api:

        async def text(stream: bool) -> tuple[str, str]:
            answer = await api.chat.completions.create(
                model="small",
                messages=[{"role": "user", "content": "Hi"}],
                max_tokens=4,
                stream=stream,
                extra_headers={"Idempotency-Key": f"stream-{stream}"},
            )
            if isinstance(answer, openai.AsyncStream):
                chunks = [chunk async for chunk in answer]
                return chunks[0].id, "".join(c.choices[0].delta.content or "" for c in chunks)
            return answer.id, answer.choices[0].message.content or ""

        for stream in (False, True):
            first = await text(stream)
            assert first[1] == "w0 w1 w2 w3 "
            assert await text(stream) == first
    await served.quiet(records=4)
    assert generated(served) == 2


async def test_openai_client_waits_for_the_answer_of_another(
    database: PostgresSettings,
) -> None:
    async with (
        world(database=database) as served,
        openai.AsyncOpenAI(api_key=KEY, base_url=f"{served.url}/v1", max_retries=20) as api,
    ):
        served.pool.gate.shut()

        async def once() -> str:
            answer = await api.completions.create(
                model="small", prompt="Hi", max_tokens=3, extra_headers=NAMED
            )
            return answer.id

        first = asyncio.create_task(once())
        await served.pool.gate.reached()
        second = asyncio.create_task(once())
        await until(lambda: any(row.status == 409 for row in served.records))
        served.pool.gate.open()
        assert await first == await second
        assert generated(served) == 1


# A request that is under way, and another one under its key.


@pytest.mark.parametrize("stream", [False, True])
async def test_request_under_way_is_a_conflict(
    served: World, http: httpx.AsyncClient, stream: bool
) -> None:
    served.pool.gate.shut()
    body = ask(stream=stream)
    first = asyncio.create_task(http.post(TEXT, json=body, headers=NAMED))
    await served.pool.gate.reached()
    refusal = await http.post(TEXT, json=body, headers=NAMED)
    assert (refusal.status_code, code_of(refusal)) == (409, "idempotency_key_in_use")
    assert refusal.json()["error"]["type"] == "idempotency_error"
    assert 1 <= int(refusal.headers["retry-after"]) <= 30
    served.pool.gate.open()
    done = await first
    assert done.status_code == 200
    assert (await http.post(TEXT, json=body, headers=NAMED)).content == done.content
    await served.quiet(records=3)
    assert served.records[0].outcome is Outcome.REFUSED
    assert generated(served) == 1


@pytest.mark.parametrize("under_way", [False, True])
@pytest.mark.parametrize(
    ("path", "body"), [(TEXT, ask("another")), (TEXT, ask(stream=True)), BODIES["chat"]]
)
async def test_another_request_under_the_key_is_refused(
    served: World, http: httpx.AsyncClient, under_way: bool, path: str, body: dict[str, Any]
) -> None:
    if under_way:
        served.pool.gate.shut()
    first = asyncio.create_task(http.post(TEXT, json=ask(), headers=NAMED))
    await (served.pool.gate.reached() if under_way else first)
    refusal = await http.post(path, json=body, headers=NAMED)
    assert (refusal.status_code, code_of(refusal)) == (422, "idempotency_key_reused")
    served.pool.gate.open()
    kept = await first
    assert (await http.post(TEXT, json=ask(), headers=NAMED)).content == kept.content


async def test_principals_do_not_see_each_others_keys(
    served: World, http: httpx.AsyncClient
) -> None:
    served.authenticator.principals["other"] = principal("user-2")
    first = await http.post(TEXT, json=ask(), headers=NAMED)
    theirs = {**NAMED, "authorization": "Bearer other"}
    other = await http.post(TEXT, json=ask("another", max_tokens=3), headers=theirs)
    assert [first.status_code, other.status_code] == [200, 200]
    again = await http.post(TEXT, json=ask("another", max_tokens=3), headers=theirs)
    assert again.content == other.content
    assert again.headers["idempotent-replayed"] == "true"
    await served.quiet(records=3)
    assert generated(served) == 2


async def test_of_many_at_two_gateways_exactly_one_generates(database: PostgresSettings) -> None:
    async with (
        world(database=database) as one,
        world(database=database) as two,
        client(one) as first,
        client(two) as second,
    ):
        posts = [
            (first, second)[number % 2].post(TEXT, json=ask(), headers=NAMED)
            for number in range(30)
        ]
        answers = await asyncio.gather(*posts)
        whole = {answer.content for answer in answers if answer.status_code == 200}
        assert len(whole) == 1
        assert {answer.status_code for answer in answers} <= {200, 409}
        assert sum("idempotent-replayed" not in a.headers for a in answers if a.is_success) == 1
        assert generated(one) + generated(two) == 1


# A request that came to nothing.


Break = Callable[[World], None]


def _no_replica(served: World) -> None:
    served.pool.error = ModelNotReady()


def _no_limits_left(served: World) -> None:
    served.limits.error = RequestError("broken")


def _no_log(served: World) -> None:
    served.log.error = LogUnavailable()


def _mend(served: World) -> None:
    served.pool.error = served.limits.error = served.log.error = None


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("break_it", [_no_replica, _no_limits_left, _no_log])
async def test_failure_is_not_kept(
    served: World,
    http: httpx.AsyncClient,
    connection: asyncpg.Connection,
    break_it: Break,
    stream: bool,
) -> None:
    break_it(served)
    failed = await http.post(TEXT, json=ask(stream=stream), headers=NAMED)
    assert "[DONE]" not in failed.text
    await released(connection)
    _mend(served)
    retried = await http.post(TEXT, json=ask(stream=stream), headers=NAMED)
    assert retried.status_code == 200
    assert "idempotent-replayed" not in retried.headers


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fault", "status"), [("[[error=400]]", 400), ("[[error=500]]", 502), ("[[drop_after=2]]", 502)]
)
async def test_refusal_and_failure_of_the_engine_are_not_kept(
    served: World,
    http: httpx.AsyncClient,
    connection: asyncpg.Connection,
    fault: str,
    status: int,
    stream: bool,
) -> None:
    for count in (1, 2):
        response = await http.post(TEXT, json=ask(fault, stream=stream), headers=NAMED)
        assert "idempotent-replayed" not in response.headers
        await served.quiet(records=count)
        assert served.records[-1].status == status
        assert await connection.fetch(ALL_ROWS) == []
    assert generated(served) == 2


async def test_what_is_refused_before_takes_no_key(
    served: World, http: httpx.AsyncClient, connection: asyncpg.Connection
) -> None:
    for body in (ask(max_tokens=-1), ask(model="absent")):
        assert (await http.post(TEXT, json=body, headers=NAMED)).status_code in (400, 404)
    assert await connection.fetch(ALL_ROWS) == []


async def test_rate_limit_leaves_the_key_free_and_a_replay_is_not_counted(
    database: PostgresSettings, connection: asyncpg.Connection
) -> None:
    limits = {"default": {"requests_per_minute": 1}}
    async with world(database=database, limits=limits) as served, client(served) as http:
        first = await http.post(TEXT, json=ask(), headers=NAMED)
        for _ in range(3):
            assert (await http.post(TEXT, json=ask(), headers=NAMED)).content == first.content
        limited = await http.post(TEXT, json=ask(), headers={"Idempotency-Key": "another"})
        assert limited.status_code == 429
        assert [row["state"] for row in await connection.fetch(ALL_ROWS)] == ["sealed"]


# A client that goes away.


Hold = Callable[[World], None]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("cancel", [False, True], ids=["disconnect", "cancel"])
@pytest.mark.parametrize("step", ["reserving", "leasing", "first-token", "generating"])
async def test_client_that_goes_away_frees_the_key(
    database: PostgresSettings,
    connection: asyncpg.Connection,
    step: str,
    cancel: bool,
    stream: bool,
) -> None:
    speed = {"first-token": SLOW_START, "generating": SLOW}.get(step, FAST)
    gates = {"reserving": "limits", "leasing": "pool"}
    async with world(speed, database=database) as served, client(served) as http:
        if step in gates:
            getattr(served, gates[step]).gate.shut()
        body = ask(max_tokens=2000, stream=stream)
        asking = asyncio.create_task(http.post(TEXT, json=body, headers=NAMED))
        if step in gates:
            await getattr(served, gates[step]).gate.reached()
        else:
            least = 5 if step == "generating" else 0
            await until(lambda: served.replica.counters.requests_running == 1)
            await until(lambda: served.replica.counters.completion_tokens >= least)
        assert [row["state"] for row in await connection.fetch(ALL_ROWS)] == ["claimed"]
        if cancel:
            served.app.cancel()
        asking.cancel()
        await asyncio.wait([asking])
        row = await served.the_record()
        assert row.outcome is Outcome.CANCELLED
        assert await connection.fetch(ALL_ROWS) == []


@pytest.mark.parametrize("cancel", [False, True], ids=["disconnect", "cancel"])
async def test_client_that_goes_away_while_it_claims(
    database: PostgresSettings, served: World, connection: asyncpg.Connection, cancel: bool
) -> None:
    # A transaction holds the place of the row, so that the claim waits in PostgreSQL.
    block = connection.transaction()
    await block.start()
    await connection.execute(
        "insert into comp_ai.idempotency_keys values ('user-1', $1, 'r', sha256(''), 'claimed', "
        "gen_random_uuid(), now(), null, null, null, now(), now())",
        NAMED["Idempotency-Key"],
    )
    async with client(served) as http:
        asking = asyncio.create_task(http.post(TEXT, json=ask(), headers=NAMED))
        await lock_awaited(database)
        if cancel:
            served.app.cancel()
        asking.cancel()
        await asyncio.wait([asking])
        assert (await served.the_record()).outcome is Outcome.CANCELLED
        await block.rollback()
        assert await connection.fetch(ALL_ROWS) == []
    assert not served.limits.reserved


async def test_client_that_goes_away_after_the_answer_was_made_finds_it(
    served: World, http: httpx.AsyncClient
) -> None:
    served.log.gate.shut()
    async with client(served) as leaving:
        asking = asyncio.create_task(leaving.post(TEXT, json=ask(), headers=NAMED))
        await served.log.gate.reached()
        asking.cancel()
        await asyncio.wait([asking])
    served.log.gate.open()
    await served.quiet()
    again = await http.post(TEXT, json=ask(), headers=NAMED)
    assert again.headers["idempotent-replayed"] == "true"
    assert again.json()["choices"][0]["text"] == "w0 w1 w2 w3 w4 "
    await served.quiet(records=2)
    assert generated(served) == 1


# What is promised, and when.


@pytest.mark.parametrize("stream", [False, True])
async def test_last_byte_waits_until_the_answer_is_kept(
    database: PostgresSettings,
    served: World,
    http: httpx.AsyncClient,
    connection: asyncpg.Connection,
    stream: bool,
) -> None:
    served.log.gate.shut()
    asking = asyncio.create_task(http.post(TEXT, json=ask(stream=stream), headers=NAMED))
    await served.log.gate.reached()
    lock = connection.transaction()
    await lock.start()
    await connection.execute(f"{ALL_ROWS} for update")
    served.log.gate.open()
    await lock_awaited(database)
    assert served.records
    assert "last" not in served.events
    await lock.rollback()
    done = await asking
    [row] = await connection.fetch(ALL_ROWS)
    assert (row["state"], row["answer"]) == ("sealed", None)
    assert (await http.post(TEXT, json=ask(stream=stream), headers=NAMED)).content == done.content


async def test_gateway_that_is_killed_frees_its_keys(
    served: World, http: httpx.AsyncClient, database: PostgresSettings
) -> None:
    dying = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        _CLAIM,
        database.host,
        str(database.port),
        database.user,
        database.password.get_secret_value() if database.password else "",
        database.database,
        NAMED["Idempotency-Key"],
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    try:
        assert dying.stdout is not None
        assert await dying.stdout.readline() == b"claimed\n"
        refusal = await http.post(
            TEXT, content=b'{"model": "small", "prompt": "Hi"}', headers=NAMED
        )
        assert refusal.status_code == 409
    finally:
        dying.kill()
        await dying.wait()
    async with asyncio.timeout(30):
        while True:
            answer = await http.post(TEXT, content=BODY, headers=NAMED)
            if answer.status_code == 200:
                break
            assert code_of(answer) == "idempotency_key_in_use"
    assert generated(served) == 1


_CLAIM = """
import asyncio, sys
from serve_app.accounts.sealing.master_keys import MasterKeys
from serve_app.accounts.sealing.subject_keys import SubjectKeys
from serve_app.config import IdempotencyConfig
from serve_app.lazy_pool import build_pool
from serve_app.settings import PostgresSettings
from serve_app.stored.idempotency import Claim, KeyUse
from serve_app.stored.vault import Vault

async def main():
    names = ("POSTGRES_HOST", "POSTGRES_PORT", "POSTGRES_USER", "POSTGRES_PASSWORD", "POSTGRES_DB")
    settings = PostgresSettings.model_validate(dict(zip(names, sys.argv[1:6])))
    pool = build_pool(settings, application_name="dying", max_size=1)
    use = KeyUse.of("user-1", sys.argv[6], "completions", b'{"model": "small", "prompt": "Hi"}')
    vault = Vault(SubjectKeys(MasterKeys([])))
    assert await Claim(pool, vault, IdempotencyConfig(claim_s=1), use).take() is None
    print("claimed", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_answer_past_its_time_is_generated_again(
    served: World, http: httpx.AsyncClient, connection: asyncpg.Connection
) -> None:
    await http.post(TEXT, json=ask(), headers=NAMED)
    await connection.execute("update comp_ai.idempotency_keys set expires_at = now()")
    again = await http.post(TEXT, json=ask(), headers=NAMED)
    assert again.status_code == 200
    assert "idempotent-replayed" not in again.headers
    await served.quiet(records=2)
    assert generated(served) == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_answer_that_is_too_long_goes_out_once(
    database: PostgresSettings, stream: bool
) -> None:
    policy = {"max_stored_bytes": 300}
    async with world(database=database, idempotency=policy) as served, client(served) as http:
        body = ask(max_tokens=200, stream=stream)
        first = await http.post(TEXT, json=body, headers=NAMED)
        assert len(first.content) > 300
        refusal = await http.post(TEXT, json=body, headers=NAMED)
        assert (refusal.status_code, code_of(refusal)) == (409, "idempotency_answer_not_kept")
        assert "another key" in refusal.json()["error"]["message"]
        await served.quiet(records=2)
        assert generated(served) == 1


@pytest.mark.parametrize("key", ["", "x" * 256, "a\tb", "é".encode()])
async def test_what_is_no_key_is_refused(
    served: World, http: httpx.AsyncClient, key: str | bytes
) -> None:
    raw = key.encode() if isinstance(key, str) else key
    response = await http.post(TEXT, json=ask(), headers=[(b"Idempotency-Key", raw)])
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "Idempotency-Key"
    await served.quiet()
    assert generated(served) == 0


async def test_key_is_refused_where_no_answers_may_be_kept(
    database: PostgresSettings, connection: asyncpg.Connection
) -> None:
    async with world(database=database, bodies="none") as served, client(served) as http:
        response = await http.post(TEXT, json=ask(), headers=NAMED)
        assert (response.status_code, code_of(response)) == (400, "unsupported_parameter")
        assert "bodies: none" in response.json()["error"]["message"]
        assert (await http.post(TEXT, json=ask())).status_code == 200
        assert await connection.fetch(ALL_ROWS) == []


async def test_other_addresses_ignore_the_key(served: World, http: httpx.AsyncClient) -> None:
    for _ in range(2):
        models = await http.get("/v1/models", headers=NAMED)
        assert models.status_code == 200
        assert "idempotent-replayed" not in models.headers


# PostgreSQL goes away.


async def test_without_postgres_a_key_is_refused_and_a_request_without_one_is_served() -> None:
    async with world() as served, client(served) as http:
        response = await http.post(TEXT, json=ask(), headers=NAMED)
        assert (response.status_code, code_of(response)) == (503, "store_unavailable")
        assert int(response.headers["retry-after"]) >= 1
        assert (await http.post(TEXT, json=ask())).status_code == 200
        await served.quiet(records=2)
        assert generated(served) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_answer_goes_out_though_postgres_died_meanwhile(
    own_server: PostgresServer, stream: bool
) -> None:
    settings = own_server.embedded.settings()
    async with world(database=settings) as served, client(served) as http:
        served.pool.gate.shut()
        body = ask(stream=stream)
        asking = asyncio.create_task(http.post(TEXT, json=body, headers=NAMED))
        await served.pool.gate.reached()
        own_server.kill()
        served.pool.gate.open()
        first = await asking
        assert first.status_code == 200
        if stream:
            assert parse_events(first.text)[-1] == "[DONE]"
        assert (await served.the_record()).outcome is Outcome.COMPLETED
        refusal = await http.post(TEXT, json=body, headers=NAMED)
        assert (refusal.status_code, code_of(refusal)) == (503, "store_unavailable")
        await asyncio.to_thread(own_server.start)
        await asyncio.to_thread(own_server.admin, "select 1")
        # The claim is still there, and ends by itself.
        connection = await connect(settings, application_name="tests")
        assert [row["state"] for row in await connection.fetch(ALL_ROWS)] == ["claimed"]
        await connection.execute("update comp_ai.idempotency_keys set claim_expires_at = now()")
        await connection.close()
        async with asyncio.timeout(30):
            while (again := await http.post(TEXT, json=body, headers=NAMED)).status_code == 503:
                assert code_of(again) == "store_unavailable"
        assert again.status_code == 200
        assert "idempotent-replayed" not in again.headers
