"""What callers store and upload lies sealed in PostgreSQL, and goes with the key of its owner."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import orjson
import pytest

from serve_app.accounts.sealing.master_keys import MasterKeys, new_master_key
from serve_app.accounts.sealing.rotation import rotate
from serve_app.accounts.sealing.subject_keys import SubjectKeys
from serve_app.audit.act import Actor
from serve_app.batches.batch import LineState, OpenBatch
from serve_app.batches.files import FileStore, StoredFile
from serve_app.batches.house import House
from serve_app.batches.store import BatchStore, NewBatch
from serve_app.batches.verdict import Finished
from serve_app.batches.work import BatchWork
from serve_app.config import FilesConfig, GatewayConfig, IdempotencyConfig
from serve_app.database import connect
from serve_app.errors import AnswerNotKept, NotFound, ResponseNotFound, StoreUnavailable
from serve_app.identity.principal import Principal
from serve_app.lazy_pool import LazyPool, build_pool
from serve_app.settings import PostgresSettings
from serve_app.stored.idempotency import Claim, KeyUse, StoredAnswer
from serve_app.stored.items import input_items
from serve_app.stored.responses import ResponseStore, StoredResponse
from serve_app.stored.vault import Vault
from serve_app.subjects.erasing import Eraser
from serve_app.subjects.exporting import export
from tests.integration.fakes import principal
from tests.integration.locks import lock_awaited
from tests.integration.people import places_of
from tests.sealing import MASTERS, VAULT, subject_keys

MARKER = "MARKER-OF-A-TEXT"
ANN = "ann:müller/x"
BY = Actor(id="ops@host", kind="operator")
CONFIG = GatewayConfig.model_validate({"models": [{"name": "small", "app": "model-small"}]})
CHAT = "/v1/chat/completions"
ANSWER = StoredAnswer(status=200, media_type="application/json", body=f'"{MARKER}"'.encode())
PIECES = (b"\x00\xff" + MARKER.encode(), MARKER.encode() * 3)


@pytest.fixture
async def pool(database: PostgresSettings) -> AsyncIterator[LazyPool]:
    made = build_pool(database, application_name="tests-stores", max_size=3)
    yield made
    await made.close()


def response(response_id: str, **more: Any) -> dict[str, Any]:
    part = {"type": "output_text", "text": f"{MARKER} answer", "annotations": []}
    message = {"type": "message", "id": "msg_1", "content": [part]}
    return {"id": response_id, "status": "completed", "output": [message], **more}


def stored(response_id: str, **more: Any) -> StoredResponse:
    fields: dict[str, Any] = {"response": response(response_id), "keep_s": 600.0, **more}
    return StoredResponse(
        id=response_id,
        principal_id=ANN,
        model="small",
        items=input_items(f"{MARKER} ask"),
        **fields,
    )


def claim(pool: LazyPool, vault: Vault = VAULT) -> Claim:
    return Claim(pool, vault, IdempotencyConfig(), KeyUse.of(ANN, "key-1", "r", b"{}"))


async def keep(pool: LazyPool, vault: Vault = VAULT) -> None:
    taken = claim(pool, vault)
    assert await taken.take() is None
    await taken.keep(ANSWER)


async def pieces() -> AsyncIterator[bytes]:
    for piece in PIECES:
        yield piece


async def add_file(
    pool: LazyPool, chunks: AsyncIterator[bytes] | None = None, size_bytes: int | None = None
) -> StoredFile:
    size_bytes = size_bytes or sum(map(len, PIECES))
    files = FileStore(pool, VAULT)
    return await files.add(ANN, f"{MARKER}.jsonl", size_bytes, chunks or pieces(), FilesConfig())


async def content(pool: LazyPool, file_id: str) -> bytes:
    files = FileStore(pool, VAULT)
    found = await files.find(ANN, file_id)
    return b"".join([chunk async for chunk in files.read(found)])


def ann() -> Principal:
    return principal(ANN)


async def add_batch(pool: LazyPool, *lines: dict[str, Any]) -> str:
    """Keep a batch of `lines`; it is not begun."""

    async def chunks() -> AsyncIterator[bytes]:
        yield text

    text = b"".join(orjson.dumps(line) + b"\n" for line in lines)
    file = await add_file(pool, chunks(), len(text))
    new = NewBatch(
        endpoint=CHAT,
        input_file_id=file.id,
        metadata={"note": MARKER},
        output_expires_after_s=None,
    )
    return str((await BatchStore(pool, VAULT).add(ann(), new, CONFIG))["id"])


def line(number: int, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": MARKER}]
    body = {"model": "small", "messages": messages}
    custom_id = f"{MARKER} {number}\n"
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body, **more}


async def the_batch(pool: LazyPool) -> OpenBatch:
    [batch] = await BatchWork(pool, VAULT).open()
    return batch


async def tend(pool: LazyPool) -> bool:
    return await House(pool, VAULT).tend(await the_batch(pool), CONFIG)


async def finish_a_line(pool: LazyPool) -> None:
    work = BatchWork(pool, VAULT)
    taken = await work.claim(await the_batch(pool), 60)
    assert taken is not None
    answer = orjson.dumps({"said": f"{MARKER} {taken.number}"})
    done = Finished(
        state=LineState.COMPLETED, status_code=200, request_id=taken.request_id, response=answer
    )
    assert await work.finish(taken, done)


async def nothing_in_the_clear(connection: asyncpg.Connection) -> bool:
    return await places_of(connection, MARKER) == {}


# Each kind: not in the clear, and read back.


async def test_a_response(pool: LazyPool, connection: asyncpg.Connection) -> None:
    store = ResponseStore(pool, VAULT)
    queued = response("resp_1", status="queued", output=[])
    await store.add(stored("resp_1", response=queued, background=True))
    assert await store.advance(response("resp_1"), ANN)
    await store.add(stored("resp_2", previous_id="resp_1", chain=("resp_1",)))
    assert await nothing_in_the_clear(connection)
    assert await store.find("resp_1", ANN) == response("resp_1")
    conversation = await store.conversation("resp_2", ANN, 100_000)
    assert [one.item["content"] for one in conversation.items[::2]] == [f"{MARKER} ask"] * 2
    assert len(await store.input_items("resp_2", ANN, 100_000)) == 3


async def test_a_response_that_is_cancelled(pool: LazyPool, connection: asyncpg.Connection) -> None:
    store = ResponseStore(pool, VAULT)
    under_way = response("resp_1", status="in_progress")
    await store.add(stored("resp_1", response=under_way, background=True))
    assert (await store.cancel("resp_1", ANN))["status"] == "cancelled"
    assert await nothing_in_the_clear(connection)
    assert await store.find("resp_1", ANN) == {**under_way, "status": "cancelled"}


async def test_an_idempotency_answer(pool: LazyPool, connection: asyncpg.Connection) -> None:
    await keep(pool)
    assert await nothing_in_the_clear(connection)
    assert await claim(pool).take() == ANSWER


async def test_a_file(pool: LazyPool, connection: asyncpg.Connection) -> None:
    file = await add_file(pool)
    assert await nothing_in_the_clear(connection)
    assert file.filename == f"{MARKER}.jsonl"
    assert await content(pool, file.id) == b"".join(PIECES)
    [listed] = await FileStore(pool, VAULT).list(
        ANN, purpose=None, after=None, limit=10, newest_first=True
    )
    assert listed == file == await FileStore(pool, VAULT).find(ANN, file.id)


async def test_a_batch_from_its_upload_to_its_results(
    pool: LazyPool, connection: asyncpg.Connection
) -> None:
    batch_id = await add_batch(pool, line(1), line(2), line(3))
    assert await tend(pool)
    await finish_a_line(pool)
    assert await connection.fetchval("select count(*) from comp_ai.batch_lines") == 3
    assert await nothing_in_the_clear(connection)
    await finish_a_line(pool)
    batches = BatchStore(pool, VAULT)
    assert (await batches.cancel(ANN, batch_id))["metadata"] == {"note": MARKER}
    await tend(pool)
    assert await nothing_in_the_clear(connection)
    done = await batches.find(ANN, batch_id)
    assert (done["status"], done["request_counts"]["completed"]) == ("cancelled", 2)
    results = (await content(pool, done["output_file_id"])).splitlines()
    said = [(one["custom_id"], one["response"]["body"]) for one in map(orjson.loads, results)]
    assert said == [(f"{MARKER} {n}\n", {"said": f"{MARKER} {n}"}) for n in (1, 2)]
    [failed] = (await content(pool, done["error_file_id"])).splitlines()
    failure = orjson.loads(failed)
    assert (failure["custom_id"], failure["response"]) == (f"{MARKER} 3\n", None)
    assert failure["error"]["code"] == "batch_cancelled"


async def test_what_was_wrong_with_a_batch(pool: LazyPool, connection: asyncpg.Connection) -> None:
    batch_id = await add_batch(pool, line(1, **{MARKER: 1}))
    assert not await tend(pool)
    assert await nothing_in_the_clear(connection)
    failed = await BatchStore(pool, VAULT).find(ANN, batch_id)
    assert failed["status"] == "failed"
    assert failed["errors"]["data"][0]["param"] == MARKER
    assert failed["metadata"] == {"note": MARKER}


# Rows of the release before.

_PLAIN = """
with response as (
    insert into comp_ai.responses
        (id, principal_id, model, status, response, input_items, expires_at)
    values ('resp_1', $1, 'small', 'completed', $2, $3, now() + interval '1 day')),
answer as (
    insert into comp_ai.idempotency_keys (principal_id, key, route, fingerprint, state, owner,
        claim_expires_at, status, media_type, answer, expires_at)
    values ($1, 'key-1', 'r', sha256('{}'), 'answered', gen_random_uuid(), now(), 200,
        'application/json', $4, now() + interval '1 day')),
file as (
    insert into comp_ai.files (id, owner, purpose, filename, bytes, status, expires_at)
    values ('file-1', $1, 'batch', 'old.jsonl', 3, 'processed', now() + interval '1 day')
    returning id),
chunk as (
    insert into comp_ai.file_chunks (file_id, number, content) select id, 0, 'old' from file),
batch as (
    insert into comp_ai.batches (id, owner, principal, endpoint, completion_window, input_file_id,
        status, metadata, total, expires_at, keep_until)
    values ('batch_1', $1, $5, '/v1/chat/completions', '24h', 'file-1', 'in_progress',
        '{"note": "old"}', 3, now() + interval '1 day', now() + interval '2 days')
    returning id)
insert into comp_ai.batch_lines
    (batch_id, number, custom_id, body, state, ready_at, status_code, response)
select id, n, 'line ' || n, case when n > 1 then '{}'::bytea end,
    case when n > 1 then 'pending' else 'completed' end, case when n > 1 then now() end,
    case when n = 1 then 200 end, case when n = 1 then '{"said": 1}'::bytea end
from batch, generate_series(1, 3) as n
"""


async def test_rows_of_the_release_before_are_read_and_finished(
    pool: LazyPool, connection: asyncpg.Connection
) -> None:
    batches = BatchStore(pool, VAULT)
    new = NewBatch(endpoint=CHAT, input_file_id="f", metadata=None, output_expires_after_s=None)
    as_json = "select principal from comp_ai.batches where id = $1"
    made = await batches.add(ann(), new, CONFIG)
    whose = await connection.fetchval(as_json, made["id"])
    await connection.execute("delete from comp_ai.batches")
    items = '[{"id": "i", "item": {"type": "message", "role": "user", "content": "old"}}]'
    text = orjson.dumps(response("resp_1")).decode()
    await connection.execute(_PLAIN, ANN, text, items, ANSWER.body, whose)

    store = ResponseStore(pool, VAULT)
    assert await store.find("resp_1", ANN) == response("resp_1")
    await store.add(stored("resp_2", previous_id="resp_1"))
    assert len((await store.conversation("resp_2", ANN, 100_000)).items) == 4
    assert await claim(pool).take() == ANSWER
    assert (await FileStore(pool, VAULT).find(ANN, "file-1")).filename == "old.jsonl"
    assert await content(pool, "file-1") == b"old"
    assert (await batches.find(ANN, "batch_1"))["metadata"] == {"note": "old"}
    exported = await exported_of(connection)
    assert [one["content_base64"] for one in exported["file_chunk"]] == ["b2xk"]
    assert {one["custom_id"] for one in exported["batch_line"]} == {"line 1", "line 2", "line 3"}

    await finish_a_line(pool)
    await batches.cancel(ANN, "batch_1")
    await tend(pool)
    done = await batches.find(ANN, "batch_1")
    results = [orjson.loads(x) for x in (await content(pool, done["output_file_id"])).splitlines()]
    assert [(one["custom_id"], one["response"]["body"]) for one in results] == [
        ("line 1", {"said": 1}), ("line 2", {"said": f"{MARKER} 2"}),
    ]  # fmt: skip
    [failed] = (await content(pool, done["error_file_id"])).splitlines()
    assert orjson.loads(failed)["custom_id"] == "line 3"


def of_the_release_before(name: str) -> str:
    text = (Path(__file__).parent / "previous_release" / "statements.sql").read_text("utf-8")
    _, *parts = re.split(r"^-- name: (\w+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))[name]


async def test_the_release_before_takes_nothing_sealed_for_something_else(
    pool: LazyPool, connection: asyncpg.Connection
) -> None:
    await keep(pool)
    row = await connection.fetchrow(of_the_release_before("stored_idempotency_look"), ANN, "key-1")
    assert row is not None
    # Neither claimed nor answered is a request under way to it, and is asked for again later.
    assert row["state"] not in ("claimed", "answered", "not_kept")
    await add_batch(pool, line(1))
    await tend(pool)
    await finish_a_line(pool)
    batch = await the_batch(pool)
    assert batch.settled
    [seen] = await connection.fetch(of_the_release_before("batches_open_batches"))
    # So it neither ends the batch nor writes results without what it cannot read.
    assert not seen["settled"]
    assert await connection.fetchval(of_the_release_before("batches_lines_are_open"), batch.id)
    assert not await connection.fetch(of_the_release_before("batches_claim_line"), batch.id, 60.0)


# Keys that are gone, are not here, or are of something else.


async def exported_of(connection: asyncpg.Connection) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    async for raw in export(connection, ANN, subject_keys()):
        one = orjson.loads(raw)
        found.setdefault(one["kind"], []).append(one)
    return found


_STORES = ("responses", "idempotency_keys", "files", "file_chunks", "batches", "batch_lines")


async def test_rows_of_before_an_erasure_open_to_nothing(
    pool: LazyPool, connection: asyncpg.Connection
) -> None:
    store = ResponseStore(pool, VAULT)
    await store.add(stored("resp_1"))
    await keep(pool)
    file = await add_file(pool)
    batch_id = await add_batch(pool, line(1), line(2))
    await tend(pool)
    await finish_a_line(pool)
    exported = await exported_of(connection)
    assert MARKER in exported["response"][0]["input_items"][0]["item"]["content"]
    assert exported["idempotency_answer"][0]["answer"] == f'"{MARKER}"'
    assert exported["file"][0]["filename"] == f"{MARKER}.jsonl"
    assert exported["batch"][0]["metadata"] == {"note": MARKER}
    assert "said" in exported["batch_line"][0]["response"]
    assert not any("sealed" in one or "key_id" in one for of in exported.values() for one in of)

    await connection.execute("create schema backup")
    for table in _STORES:
        await connection.execute(f"create table backup.{table} as table comp_ai.{table}")
    await Eraser(connection, MASTERS).erase(ANN, BY)
    for table in _STORES:
        assert await connection.fetchval(f"select count(*) from comp_ai.{table}") == 0
        await connection.execute(f"insert into comp_ai.{table} table backup.{table}")

    with pytest.raises(ResponseNotFound):
        await store.find("resp_1", ANN)
    with pytest.raises(ResponseNotFound):
        await store.conversation("resp_1", ANN, 100_000)
    with pytest.raises(ResponseNotFound):
        await store.input_items("resp_1", ANN, 100_000)
    with pytest.raises(AnswerNotKept):
        await claim(pool).take()
    assert (await FileStore(pool, VAULT).find(ANN, file.id)).filename == ""
    with pytest.raises(NotFound):
        await content(pool, file.id)
    assert (await BatchStore(pool, VAULT).find(ANN, batch_id))["metadata"] is None
    taken = await BatchWork(pool, VAULT).claim(await the_batch(pool), 60)
    assert taken is not None
    assert (taken.custom_id, taken.body) == ("", None)
    destroyed = await exported_of(connection)
    for kind in ("response", "idempotency_answer", "file", "file_chunk", "batch", "batch_line"):
        assert {one["texts"] for one in destroyed[kind]} == {"destroyed"}, kind

    # Who comes back is stored under a new key, by the process that knew the old one.
    await store.add(stored("resp_2"))
    assert await store.find("resp_2", ANN) == response("resp_2")


async def test_nothing_outlives_an_erasure_under_the_key_that_it_destroys(
    pool: LazyPool, database: PostgresSettings, connection: asyncpg.Connection
) -> None:
    store = ResponseStore(pool, VAULT)
    await store.add(stored("resp_1"))
    holder = await connect(database, application_name="tests-holder")
    holding = holder.transaction()
    await holding.start()
    await VAULT.seal(holder, ANN, [(b"place", b"text")])
    erasing = asyncio.create_task(Eraser(connection, MASTERS).erase(ANN, BY))
    await lock_awaited(database)
    # It begins while the erasure waits for the key, and may hold it, too.
    await store.add(stored("resp_2"))
    await holding.rollback()
    await holder.close()
    await erasing
    assert await connection.fetchval("select count(*) from comp_ai.responses") == 0


async def test_a_batch_that_goes_while_its_results_are_written_leaves_none(
    pool: LazyPool, database: PostgresSettings, connection: asyncpg.Connection
) -> None:
    batch_id = await add_batch(pool, line(1))
    await tend(pool)
    await finish_a_line(pool)
    await connection.execute("update comp_ai.batches set status = 'finalizing'")
    removing = connection.transaction()
    await removing.start()
    await connection.execute("delete from comp_ai.batches where id = $1", batch_id)
    tending = asyncio.create_task(tend(pool))
    await lock_awaited(database)
    await removing.commit()
    await tending
    results = "select count(*) from comp_ai.files where purpose = 'batch_output'"
    assert await connection.fetchval(results) == 0


async def test_a_text_in_another_place_does_not_open(
    pool: LazyPool, connection: asyncpg.Connection
) -> None:
    store = ResponseStore(pool, VAULT)
    await store.add(stored("resp_1"))
    await store.add(stored("resp_2"))
    await connection.execute(
        "update comp_ai.responses r set sealed = o.sealed from comp_ai.responses o "
        "where r.id = 'resp_1' and o.id = 'resp_2'"
    )
    with pytest.raises(StoreUnavailable):
        await store.find("resp_1", ANN)


async def test_without_a_master_key_nothing_is_stored_and_nothing_is_in_the_clear(
    pool: LazyPool, connection: asyncpg.Connection
) -> None:
    bare = Vault(SubjectKeys(MasterKeys([])))
    with pytest.raises(StoreUnavailable, match="No master key"):
        await ResponseStore(pool, bare).add(stored("resp_1"))
    with pytest.raises(StoreUnavailable, match="No master key"):
        await FileStore(pool, bare).add(ANN, MARKER, 3, pieces(), FilesConfig())
    assert await nothing_in_the_clear(connection)
    assert await connection.fetchval("select count(*) from comp_ai.files") == 0


async def test_the_master_key_may_change(pool: LazyPool, connection: asyncpg.Connection) -> None:
    old, new = new_master_key(), new_master_key()
    before = ResponseStore(pool, Vault(SubjectKeys(MasterKeys.parse(old))))
    await before.add(stored("resp_1"))
    await rotate(connection, MasterKeys.parse(f"{new},{old}"), BY)
    after = ResponseStore(pool, Vault(SubjectKeys(MasterKeys.parse(new))))
    assert await after.find("resp_1", ANN) == response("resp_1")
    fresh = ResponseStore(pool, Vault(SubjectKeys(MasterKeys.parse(old))))
    with pytest.raises(StoreUnavailable):
        await fresh.find("resp_1", ANN)
