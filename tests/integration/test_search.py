"""Finding requests as an auditor: what is found, what is not shown, and that it is written down."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import httpx
import pytest

from serve_app.accounts import writer
from serve_app.identity.principal import Permission
from serve_app.records import Outcome, RequestRecord, new_id
from serve_app.settings import PostgresSettings
from tests.integration.fakes import World, client, principal, world
from tests.sealing import subject_keys

AUDITOR = "key-of-an-auditor"
KEY_ID = uuid.UUID(int=7)
START = datetime(2026, 3, 1, 12, tzinfo=UTC)
RECORDS = [
    RequestRecord(
        id=new_id(),
        request_id=f"request-{number // 2}",
        # Two at the same moment, as many in the same microsecond as there may be.
        created_at=START + timedelta(minutes=number // 2),
        route="chat.completions",
        status=502 if number % 5 == 0 else 200,
        outcome=Outcome.FAILED if number % 5 == 0 else Outcome.COMPLETED,
        principal_id="ann" if number % 2 else "bob",
        api_key_id=KEY_ID if number % 3 == 0 else None,
        model="m" if number % 7 else "n",
        request_body="the secret prompt",
        response_text="the secret answer",
    )
    for number in range(40)
]


@pytest.fixture
async def served(
    database: PostgresSettings, connection: asyncpg.Connection
) -> AsyncIterator[World]:
    await writer.prepare_session(connection)
    await writer.write(connection, RECORDS, subject_keys())
    async with world(database=database) as made:
        made.authenticator.principals[AUDITOR] = principal(
            "eva", permissions=frozenset({Permission.AUDITOR})
        )
        yield made


@pytest.fixture
async def http(served: World) -> AsyncIterator[httpx.AsyncClient]:
    async with client(served) as opened:
        opened.headers["authorization"] = f"Bearer {AUDITOR}"
        yield opened


def newest(wanted: Callable[[RequestRecord], bool] = lambda record: True) -> list[str]:
    found = sorted(filter(wanted, RECORDS), key=lambda r: (r.created_at, r.id), reverse=True)
    return [str(record.id) for record in found]


async def find(http: httpx.AsyncClient, **query: Any) -> list[str]:
    response = await http.get("/admin/requests", params=query)
    assert response.status_code == 200, response.text
    assert "secret" not in response.text
    return [row["id"] for row in response.json()["data"]]


async def test_each_filter_finds_its_requests_newest_first(http: httpx.AsyncClient) -> None:
    since, until = START + timedelta(minutes=3), START + timedelta(minutes=9)
    filters: list[tuple[dict[str, Any], Callable[[RequestRecord], bool]]] = [
        ({}, lambda r: True),
        ({"principal": "ann"}, lambda r: r.principal_id == "ann"),
        ({"key": str(KEY_ID)}, lambda r: r.api_key_id == KEY_ID),
        ({"model": "n"}, lambda r: r.model == "n"),
        ({"outcome": "failed"}, lambda r: r.outcome is Outcome.FAILED),
        ({"outcome": "timed_out"}, lambda r: False),
        ({"status": 502, "principal": "bob"}, lambda r: (r.status, r.principal_id) == (502, "bob")),
        ({"request_id": "request-4"}, lambda r: r.request_id == "request-4"),
        (
            {"from": since.isoformat(), "to": until.isoformat()},
            lambda r: since <= r.created_at < until,
        ),
    ]
    for query, wanted in filters:
        assert await find(http, **query) == newest(wanted), query


async def test_pages_are_the_whole(http: httpx.AsyncClient) -> None:
    found = await find(http, limit=7, principal="ann")
    while len(found) % 7 == 0:
        found += await find(http, limit=7, principal="ann", after=found[-1])
    assert found == newest(lambda r: r.principal_id == "ann")


async def test_one_request_shows_its_texts_only_where_they_are_asked_for(
    http: httpx.AsyncClient,
) -> None:
    record = RECORDS[7]
    plain = await http.get(f"/admin/requests/{record.id}")
    assert "secret" not in plain.text
    assert plain.json()["created_at"] == record.created_at.isoformat(timespec="microseconds")
    whole = (await http.get(f"/admin/requests/{record.id}", params={"body": "true"})).json()
    assert whole["body"] == {"request": "the secret prompt", "response": "the secret answer"}
    assert {name: value for name, value in whole.items() if name != "body"} == plain.json()


async def test_texts_of_an_erased_subject_are_none(
    http: httpx.AsyncClient, connection: asyncpg.Connection
) -> None:
    await connection.execute("delete from comp_ai_keys.subject_keys")
    response = await http.get(f"/admin/requests/{RECORDS[0].id}", params={"body": "true"})
    assert (response.status_code, response.json()["body"]) == (200, None)


async def test_each_look_is_written_down_and_only_auditors_look(
    served: World, http: httpx.AsyncClient, connection: asyncpg.Connection
) -> None:
    await find(http, principal="ann", limit=5)
    one = str(RECORDS[0].id)
    await http.get(f"/admin/requests/{one}", params={"body": "true"})
    for missing in (uuid.uuid4(), "x"):
        assert (await http.get(f"/admin/requests/{missing}")).status_code == 404
    async with client(served) as user:
        assert (await user.get("/admin/requests")).status_code == 403
        assert (await user.get(f"/admin/requests/{one}")).status_code == 403
    looks = await connection.fetch(
        "select actor_id, action, target, after from comp_ai.audit_log "
        "where action like 'requests.%' order by seq"
    )
    assert {look["actor_id"] for look in looks} == {"eva"}
    said = [(look["action"], look["target"], json.loads(look["after"])) for look in looks]
    assert said[:2] == [
        ("requests.search", None, {"query": {"principal": "ann", "limit": "5"}, "rows": 5}),
        ("requests.read", one, {"query": {"body": "true"}, "rows": 1}),
    ]
    assert [look[2]["rows"] for look in said[2:]] == [0, 0]
    await connection.execute("alter table comp_ai.audit_head rename to gone")
    assert (await http.get(f"/admin/requests/{one}")).status_code == 503


async def test_what_is_asked_wrongly_is_refused_by_name(http: httpx.AsyncClient) -> None:
    for query, param in (
        ({"outcome": "lost"}, "outcome"),
        ({"status": "20"}, "status"),
        ({"key": "x"}, "key"),
        ({"from": "2026-03-02", "to": "2026-03-01"}, "to"),
        ({"after": str(uuid.uuid4())}, "after"),
        ({"after": "x"}, "after"),
        ({"user": "ann"}, "user"),
    ):
        response = await http.get("/admin/requests", params=query)
        refused = response.json()["error"]["param"]
        assert (response.status_code, refused) == (400, param), query
    response = await http.get(f"/admin/requests/{RECORDS[0].id}", params={"body": "yes"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "body")
