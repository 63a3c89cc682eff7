"""The stored responses, in a real PostgreSQL."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from serve_app.database import connect
from serve_app.errors import InvalidRequest, ResponseNotFound, StoreUnavailable
from serve_app.lazy_pool import build_pool
from serve_app.settings import PostgresSettings
from serve_app.stored.items import input_items
from serve_app.stored.responses import MAX_CHAIN, ResponseStore, StoredResponse
from tests.integration.conftest import PostgresServer
from tests.sealing import VAULT

MINE, OTHERS = "user-1", "user-2"
BYTES = 1_000_000


def answer(response_id: str, text: str = "pong", status: str = "completed") -> dict[str, Any]:
    """Return a response object."""
    part = {"type": "output_text", "text": text, "annotations": []}
    message = {"type": "message", "id": f"msg_{response_id}", "content": [part]}
    output = [] if status in ("queued", "in_progress") else [message]
    return {"id": response_id, "status": status, "error": None, "output": output}


def stored(response_id: str, text: str = "ping", **more: Any) -> StoredResponse:
    """Return a response of `MINE` as it is put into the store."""
    status = more.pop("status", "completed")
    fields: dict[str, Any] = {
        "principal_id": MINE,
        "model": "small",
        "response": answer(response_id, status=status),
        "items": input_items(text),
        "keep_s": 60.0,
    }
    return StoredResponse(id=response_id, **{**fields, **more})


@pytest.fixture
async def store(database: PostgresSettings) -> AsyncIterator[ResponseStore]:
    """A store with an empty table."""
    pool = build_pool(database, application_name="tests", max_size=2)
    yield ResponseStore(pool, VAULT)
    await pool.close()


async def execute(database: PostgresSettings, statement: str, *args: object) -> Any:
    """Run one statement and return what it returns first."""
    connection = await connect(database, application_name="tests")
    try:
        return await connection.fetchval(statement, *args)
    finally:
        await connection.close()


async def test_only_the_owner_finds_a_response(store: ResponseStore) -> None:
    await store.add(stored("resp_1"))
    assert await store.find("resp_1", MINE) == answer("resp_1")
    for response_id, principal_id in (("resp_1", OTHERS), ("resp_2", MINE), ("\x01é", MINE)):
        with pytest.raises(ResponseNotFound):
            await store.find(response_id, principal_id)
        with pytest.raises(ResponseNotFound):
            await store.delete(response_id, principal_id)
        with pytest.raises(ResponseNotFound):
            await store.cancel(response_id, principal_id)
        with pytest.raises(ResponseNotFound):
            await store.input_items(response_id, principal_id, BYTES)
        with pytest.raises(ResponseNotFound):
            await store.conversation(response_id, principal_id, BYTES)
    assert await store.find("resp_1", MINE) == answer("resp_1")


async def test_deleted_response_is_gone(store: ResponseStore) -> None:
    await store.add(stored("resp_1"))
    await store.delete("resp_1", MINE)
    with pytest.raises(ResponseNotFound):
        await store.find("resp_1", MINE)


async def test_any_text_comes_back_as_it_was(store: ResponseStore) -> None:
    text = 'zero \x00, quote ", snowman ☃, astral 🜁'
    await store.add(stored("resp_1", text))
    (item,) = await store.input_items("resp_1", MINE, BYTES)
    assert item.item["content"] == text


async def chain(store: ResponseStore, length: int) -> None:
    """Store `length` responses, each of which continues the one before it."""
    for number in range(1, length + 1):
        before = f"resp_{number - 1}" if number > 1 else None
        await store.add(stored(f"resp_{number}", f"ping {number}", previous_id=before))


async def test_conversation_begins_with_the_oldest(store: ResponseStore) -> None:
    await chain(store, 3)
    conversation = await store.conversation("resp_3", MINE, BYTES)
    assert conversation.ids == ["resp_1", "resp_2", "resp_3"]
    said = [one.item["content"] for one in conversation.items]
    pong = [{"type": "output_text", "text": "pong", "annotations": []}]
    assert said == ["ping 1", pong, "ping 2", pong, "ping 3", pong]
    listed = await store.input_items("resp_3", MINE, BYTES)
    assert [one.id for one in listed] == [one.id for one in conversation.items][:-1]


async def test_conversation_of_somebody_else_cannot_be_continued(store: ResponseStore) -> None:
    await store.add(stored("resp_1", principal_id=OTHERS))
    # This cannot come about through the gateway; the store does not rely on that.
    await store.add(stored("resp_2", previous_id="resp_1"))
    with pytest.raises(ResponseNotFound) as raised:
        await store.conversation("resp_2", MINE, BYTES)
    assert raised.value.param == "previous_response_id"
    assert len(await store.input_items("resp_2", MINE, BYTES)) == 1


async def test_conversation_with_a_deleted_beginning_cannot_be_continued(
    store: ResponseStore,
) -> None:
    await chain(store, 3)
    await store.delete("resp_1", MINE)
    with pytest.raises(ResponseNotFound, match="resp_1"):
        await store.conversation("resp_3", MINE, BYTES)
    assert len(await store.input_items("resp_3", MINE, BYTES)) == 3


async def test_conversation_is_bounded_in_length(store: ResponseStore) -> None:
    await chain(store, MAX_CHAIN + 1)
    assert len((await store.conversation(f"resp_{MAX_CHAIN}", MINE, BYTES)).ids) == MAX_CHAIN
    with pytest.raises(InvalidRequest, match="longer than"):
        await store.conversation(f"resp_{MAX_CHAIN + 1}", MINE, BYTES)


async def test_conversation_is_bounded_in_bytes(store: ResponseStore) -> None:
    await chain(store, 3)
    with pytest.raises(InvalidRequest, match="longer than"):
        await store.conversation("resp_3", MINE, 200)


@pytest.mark.parametrize("status", ["queued", "in_progress", "failed", "cancelled"])
async def test_only_an_answer_can_be_continued(store: ResponseStore, status: str) -> None:
    await store.add(stored("resp_1", status=status, background=True))
    with pytest.raises(InvalidRequest, match=f"is {status}"):
        await store.conversation("resp_1", MINE, BYTES)


async def test_past_its_time_it_is_not_found_and_then_removed(
    store: ResponseStore, database: PostgresSettings
) -> None:
    await store.add(stored("resp_1", keep_s=0.0))
    with pytest.raises(ResponseNotFound):
        await store.find("resp_1", MINE)
    with pytest.raises(ResponseNotFound):
        await store.conversation("resp_1", MINE, BYTES)


async def test_a_conversation_that_goes_on_is_kept_whole(
    store: ResponseStore, database: PostgresSettings
) -> None:
    await store.add(stored("resp_1", keep_s=60.0))
    await store.add(stored("resp_2", keep_s=3600.0, previous_id="resp_1", chain=["resp_1"]))
    await store.add(stored("resp_3", keep_s=60.0, previous_id="resp_2", chain=["resp_1", "resp_2"]))
    query = "select extract(epoch from expires_at - now())::int from comp_ai.responses where id=$1"
    assert await execute(database, query, "resp_1") > 3500
    assert await execute(database, query, "resp_2") > 3500
    assert await execute(database, query, "resp_3") <= 60


# In the background.


async def test_states_of_a_background_response(store: ResponseStore) -> None:
    await store.add(stored("resp_1", status="queued", background=True))
    assert await store.advance(answer("resp_1", status="in_progress"), MINE)
    assert (await store.find("resp_1", MINE))["status"] == "in_progress"
    assert await store.beat(["resp_1", "resp_2"]) == {"resp_1"}
    assert await store.advance(answer("resp_1", "done"), MINE)
    assert await store.find("resp_1", MINE) == answer("resp_1", "done")
    assert await store.beat(["resp_1"]) == set()
    # It has ended, so nothing changes it any more.
    assert not await store.advance(answer("resp_1", status="failed"), MINE)
    assert (await store.cancel("resp_1", MINE))["status"] == "completed"


async def test_cancelled_response_stays_cancelled(store: ResponseStore) -> None:
    await store.add(stored("resp_1", status="queued", background=True))
    for _ in range(2):
        assert (await store.cancel("resp_1", MINE))["status"] == "cancelled"
    assert await store.beat(["resp_1"]) == set()
    assert not await store.advance(answer("resp_1"), MINE)
    assert (await store.find("resp_1", MINE))["status"] == "cancelled"


async def test_only_a_background_response_is_cancelled(store: ResponseStore) -> None:
    await store.add(stored("resp_1"))
    with pytest.raises(InvalidRequest, match="background"):
        await store.cancel("resp_1", MINE)


async def test_response_of_a_lost_gateway_is_seen_as_failed(
    store: ResponseStore, database: PostgresSettings
) -> None:
    await store.add(stored("resp_1", status="queued", background=True))
    await execute(database, "update comp_ai.responses set heartbeat_at = now() - interval '31 s'")
    for seen in (await store.find("resp_1", MINE), await store.cancel("resp_1", MINE)):
        assert seen["status"] == "failed"
        assert "gateway" in seen["error"]["message"]
    # It had only lost sight of PostgreSQL.
    assert await store.advance(answer("resp_1"), MINE)
    assert (await store.find("resp_1", MINE))["status"] == "completed"


async def test_without_postgresql(own_server: PostgresServer) -> None:
    pool = build_pool(own_server.embedded.settings(), application_name="tests", max_size=2)
    store = ResponseStore(pool, VAULT)
    await store.check()
    own_server.kill()
    with pytest.raises(StoreUnavailable):
        await store.check()
    with pytest.raises(StoreUnavailable):
        await store.find("resp_1", MINE)
    await pool.close()
