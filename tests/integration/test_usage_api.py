"""Usage by HTTP: one's own, and everybody's for auditors; folded or still pending."""

from __future__ import annotations

import csv
import io
import json
import random
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import httpx
import pytest

from serve_app.accounts import writer
from serve_app.identity.principal import Permission
from serve_app.records import Outcome, RequestRecord, new_id, utc_now
from serve_app.settings import PostgresSettings
from serve_app.usage.folding import fold
from tests.integration.fakes import World, client, principal, world
from tests.sealing import subject_keys

AUDITOR = "key-of-an-auditor"
KEY_ID = uuid.UUID(int=7)
START = datetime(2026, 3, 1, tzinfo=UTC)
RANGE = {"from": "2026-03-01", "to": "2026-03-11"}


def records(count: int, seed: int) -> list[RequestRecord]:
    chance = random.Random(seed)
    return [
        RequestRecord(
            id=new_id(),
            request_id="r",
            created_at=START + timedelta(minutes=chance.randrange(10 * 24 * 60), seconds=30),
            route="chat.completions",
            status=200,
            outcome=chance.choice([Outcome.COMPLETED, Outcome.COMPLETED, Outcome.FAILED]),
            principal_id=chance.choice(["user-1", "bob", None]),
            model=chance.choice(["m", "=cmd()"]),
            api_key_id=chance.choice([None, KEY_ID]),
            prompt_tokens=chance.randrange(100),
            completion_tokens=chance.randrange(100),
            cost_micros=chance.randrange(1000),
            duration_ms=float(chance.randrange(1000)),
            time_to_first_token_ms=chance.choice([None, float(chance.randrange(100))]),
        )
        for _ in range(count)
    ]


RECORDS = records(400, seed=1)
KEYS = subject_keys()


@pytest.fixture
async def filled(connection: asyncpg.Connection) -> None:
    """Most of it folded, a part still pending."""
    await writer.prepare_session(connection)
    await writer.write(connection, RECORDS[:300], KEYS)
    await fold(connection)
    await writer.write(connection, RECORDS[300:], KEYS)


@pytest.fixture
async def served(database: PostgresSettings, filled: None) -> AsyncIterator[World]:
    async with world(database=database) as made:
        made.authenticator.principals[AUDITOR] = principal(
            "eva", permissions=frozenset({Permission.AUDITOR})
        )
        yield made


@pytest.fixture
async def http(served: World) -> AsyncIterator[httpx.AsyncClient]:
    async with client(served) as opened:
        yield opened


@pytest.fixture
async def auditor(served: World) -> AsyncIterator[httpx.AsyncClient]:
    async with client(served) as opened:
        opened.headers["authorization"] = f"Bearer {AUDITOR}"
        yield opened


async def rows(http: httpx.AsyncClient, path: str, **query: Any) -> list[dict[str, Any]]:
    response = await http.get(path, params=RANGE | query)
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["data"]
    return found


def expected(
    group: Callable[[RequestRecord], tuple[Any, ...]],
    wanted: Callable[[RequestRecord], bool] = lambda record: True,
) -> dict[tuple[Any, ...], tuple[int, int, int, int]]:
    """Return requests, completed ones, tokens and cost by group, from the records themselves."""
    sums: dict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for record in filter(wanted, RECORDS):
        of = sums[group(record)]
        of[0] += 1
        of[1] += record.outcome is Outcome.COMPLETED
        of[2] += record.prompt_tokens + record.completion_tokens
        of[3] += record.cost_micros
    return {group: tuple(of) for group, of in sums.items()}  # type: ignore[misc]


def said(found: list[dict[str, Any]], *groups: str) -> dict[tuple[Any, ...], tuple[int, ...]]:
    sums = {
        tuple(row[group] for group in groups): (
            row["requests"],
            row["completed_requests"],
            row["prompt_tokens"] + row["completion_tokens"],
            row["cost_micros"],
        )
        for row in found
    }
    assert len(sums) == len(found)
    return sums


def day(record: RequestRecord) -> str:
    return record.created_at.replace(hour=0, minute=0, second=0).isoformat()


async def test_mine_is_mine_alone_by_day(http: httpx.AsyncClient) -> None:
    found = await rows(http, "/v1/usage")
    assert said(found, "start") == expected(
        lambda record: (day(record),), lambda record: record.principal_id == "user-1"
    )
    starts = [row["start"] for row in found]
    assert starts == sorted(starts, reverse=True)
    assert found[0].keys() == {
        *("id", "object", "start", "requests", "completed_requests", "prompt_tokens"),
        *("completion_tokens", "cost_micros", "mean_duration_ms", "mean_time_to_first_token_ms"),
    }


async def test_means_are_of_all_requests(http: httpx.AsyncClient) -> None:
    (row,) = await rows(http, "/v1/usage", group_by="model", model="m")
    mine = [r for r in RECORDS if (r.principal_id, r.model) == ("user-1", "m")]
    firsts = [r.time_to_first_token_ms for r in mine if r.time_to_first_token_ms is not None]
    assert row["mean_duration_ms"] == pytest.approx(
        sum(r.duration_ms for r in mine) / len(mine), abs=0.001
    )
    assert row["mean_time_to_first_token_ms"] == pytest.approx(sum(firsts) / len(firsts), abs=0.001)


async def test_all_of_it_by_every_group(auditor: httpx.AsyncClient) -> None:
    groupings: dict[str, tuple[tuple[str, ...], Callable[[RequestRecord], tuple[Any, ...]]]] = {
        "day": (("start",), lambda r: (day(r),)),
        "hour": (("start",), lambda r: (r.created_at.replace(minute=0, second=0).isoformat(),)),
        "minute": (("start",), lambda r: (r.created_at.replace(second=0).isoformat(),)),
        "principal": (("principal",), lambda r: (r.principal_id,)),
        "model": (("model",), lambda r: (r.model,)),
        "key": (("key",), lambda r: (r.api_key_id and str(r.api_key_id),)),
        "model,day,principal": (
            ("start", "principal", "model"),
            lambda r: (day(r), r.principal_id, r.model),
        ),
    }
    for group_by, (groups, of) in groupings.items():
        found = await rows(auditor, "/admin/usage", group_by=group_by, limit=1000)
        assert said(found, *groups) == expected(of), group_by


async def test_borders_that_are_no_full_days_and_filters(auditor: httpx.AsyncClient) -> None:
    since, until = START + timedelta(days=1, minutes=7), START + timedelta(days=3, hours=5)
    found = await rows(
        auditor,
        "/admin/usage",
        **{"from": since.isoformat(), "to": until.isoformat()},
        principal="bob",
        model="m",
        key=str(KEY_ID),
    )
    wanted = ("bob", "m", KEY_ID)
    assert said(found, "start") == expected(
        lambda r: (day(r),),
        lambda r: (
            since <= r.created_at < until and (r.principal_id, r.model, r.api_key_id) == wanted
        ),
    )


@pytest.mark.parametrize(
    ("order", "group_by"),
    [("desc", "principal,model,key"), ("asc", "day,principal,key"), ("desc", "hour")],
)
async def test_pages_are_the_whole_while_more_comes(
    auditor: httpx.AsyncClient, connection: asyncpg.Connection, order: str, group_by: str
) -> None:
    whole = await rows(auditor, "/admin/usage", group_by=group_by, order=order, limit=1000)
    seen: list[str] = []
    query = {"group_by": group_by, "order": order, "limit": "7", **RANGE}
    url = "/admin/usage"
    while True:
        response = await auditor.get(url, params=query)
        page = response.json()
        seen += [row["id"] for row in page["data"]]
        # What comes meanwhile adds to groups, and to those that were read already.
        await writer.write(connection, records(1, seed=len(seen)), KEYS)
        await fold(connection)
        if not page["has_more"]:
            assert "link" not in response.headers
            break
        assert response.headers["link"].endswith('>; rel="next"')
        query["after"] = page["last_id"]
    assert len(seen) == len(set(seen))
    assert set(seen) >= {row["id"] for row in whole}


async def test_csv_has_the_same_and_no_formulas(auditor: httpx.AsyncClient) -> None:
    query = {"group_by": "principal,model", "limit": "3"}
    found = await rows(auditor, "/admin/usage", **query)
    response = await auditor.get("/admin/usage", params=RANGE | query | {"format": "csv"})
    accepted = await auditor.get(
        "/admin/usage", params=RANGE | query, headers={"accept": "text/csv"}
    )
    assert response.content == accepted.content
    assert response.headers["content-type"].startswith("text/csv")
    table = list(csv.DictReader(io.StringIO(response.text)))
    assert [row["model"] for row in table] == [
        "'=cmd()" if row["model"] == "=cmd()" else row["model"] for row in found
    ]
    assert "'=cmd()" in [row["model"] for row in table]
    assert [int(row["requests"]) for row in table] == [row["requests"] for row in found]
    # The link leads on.
    following = response.headers["link"].removeprefix("<").partition(">")[0]
    assert following.startswith("?")
    more = await auditor.get(f"/admin/usage{following}")
    assert more.status_code == 200
    assert more.text.splitlines()[0] == response.text.splitlines()[0]
    assert more.text.splitlines()[1:] != response.text.splitlines()[1:]


async def test_what_is_asked_wrongly_is_refused_by_name() -> None:
    wrong: list[tuple[dict[str, str], str]] = [
        ({"group_by": "day,hour"}, "group_by"),
        ({"group_by": "principal"}, "group_by"),
        ({"group_by": "model,model"}, "group_by"),
        ({"group_by": "week"}, "group_by"),
        ({"from": "yesterday"}, "from"),
        ({"from": "2026-03-01T00:00:30Z"}, "from"),
        ({"from": "2026-03-05", "to": "2026-03-05"}, "to"),
        ({"from": "2026-01-01T00:01:00Z", "to": "2026-03-05"}, "from"),
        ({"to": "2026-03-02T00:00:00.5Z", "from": "2026-03-01"}, "to"),
        ({"key": "cai-x"}, "key"),
        ({"model": "m\x00"}, "model"),
        ({"format": "xml"}, "format"),
        ({"limit": "0"}, "limit"),
        ({"after": "x"}, "after"),
        ({"after": "WzFd"}, "after"),
        ({"group_by": "model", "after": "WyJhIiwiYiJd"}, "after"),
        ({"principal": "bob"}, "principal"),
        ({"sort": "x"}, "sort"),
    ]
    async with world() as made, client(made) as http:
        for query, param in wrong:
            response = await http.get("/v1/usage", params=query)
            refused = response.json()["error"]["param"]
            assert (response.status_code, refused) == (400, param), query


async def test_everybodys_is_for_auditors_and_each_look_is_written_down(
    http: httpx.AsyncClient, auditor: httpx.AsyncClient, connection: asyncpg.Connection
) -> None:
    assert (await http.get("/admin/usage")).status_code == 403
    query = {**RANGE, "group_by": "model", "principal": "bob"}
    found = await rows(auditor, "/admin/usage", **query)
    (look,) = await connection.fetch(
        "select * from comp_ai.audit_log where action = 'usage.read' order by seq"
    )
    assert (look["actor_id"], look["target"]) == ("eva", None)
    assert json.loads(look["after"]) == {"query": query, "rows": len(found)}


async def test_no_look_without_its_row_in_the_audit_log(
    auditor: httpx.AsyncClient, connection: asyncpg.Connection
) -> None:
    await connection.execute("alter table comp_ai.audit_head rename to gone")
    response = await auditor.get("/admin/usage", params=RANGE)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "store_unavailable")


async def test_the_last_days_are_read_where_no_time_is_named(
    http: httpx.AsyncClient, connection: asyncpg.Connection
) -> None:
    record = RequestRecord(
        id=new_id(),
        request_id="r",
        created_at=utc_now(),
        route="chat.completions",
        status=200,
        outcome=Outcome.COMPLETED,
        principal_id="user-1",
    )
    await writer.write(connection, [record], KEYS)
    for group_by in ("day", "hour", "minute", "model"):
        response = await http.get("/v1/usage", params={"group_by": group_by})
        assert [row["requests"] for row in response.json()["data"]] == [1]


async def test_a_question_that_takes_too_long_is_refused_and_stops_nobody(
    database: PostgresSettings, connection: asyncpg.Connection
) -> None:
    await connection.execute("alter table comp_ai.usage_pending rename to quick")
    await connection.execute(
        "create view comp_ai.usage_pending as with slept as materialized (select pg_sleep(60)) "
        "select * from comp_ai.quick where exists (select from slept)"
    )
    short = database.model_copy(update={"read_timeout_s": 1.0})
    async with world(database=short) as made, client(made) as http:
        response = await http.get("/v1/usage", params=RANGE)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "query_too_slow")
        await connection.execute("drop view comp_ai.usage_pending")
        await connection.execute("alter table comp_ai.quick rename to usage_pending")
        assert (await http.get("/v1/usage", params=RANGE)).status_code == 200
