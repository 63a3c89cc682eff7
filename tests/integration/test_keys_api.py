"""API keys over HTTP: one's own and everybody's, from their making to their end."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from typing import Any

import asyncpg
import httpx
import pytest

from serve_app.audit.act import Actor
from serve_app.audit.verify import verify
from serve_app.config import LimitPolicy
from serve_app.database import connect
from serve_app.identity.api_key_verifier import ApiKeyVerifier
from serve_app.identity.api_keys import KEY_START, ApiKey, ApiKeyStore, KeyTerms, generate_key
from serve_app.identity.authenticator import build_pool
from serve_app.identity.key_changes import listen_to
from serve_app.identity.principal import Permission, Principal
from serve_app.records import new_id, utc_now
from serve_app.settings import PostgresSettings
from tests.integration.fakes import FakeAuthenticator, World, principal, until, world

ADA, BOB, ADMIN = "token-of-ada", "token-of-bob", "token-of-admin"
ADMINS = frozenset({Permission.ADMIN})
ROOT = Actor(id="root", kind="operator")
MODELS = [{"name": name, "app": name} for name in ("small", "large")]
CHAT = "/v1/chat/completions"
ASK = {"model": "small", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


class Authenticator(FakeAuthenticator):
    """Knows some tokens, and the keys of the database."""

    def __init__(self, database: PostgresSettings) -> None:
        super().__init__()
        self._pool = build_pool(database)
        self.listener = listen_to(database)
        self.store = ApiKeyStore(self._pool)
        self.verifier = ApiKeyVerifier(self.store, self.listener)
        self.principals = {
            ADA: principal("ada"),
            BOB: principal("bob"),
            ADMIN: principal("root", permissions=ADMINS),
        }

    async def authenticate(self, authorization: str | None) -> Principal:
        credential = (authorization or "").removeprefix("Bearer ")
        if credential.startswith(KEY_START):
            return await self.verifier.verify(credential)
        return await super().authenticate(authorization)

    async def close(self) -> None:
        await self.verifier.close()
        await self._pool.close()


@asynccontextmanager
async def gateway(database: PostgresSettings, **config: Any) -> AsyncIterator[World]:
    """Serve one gateway that knows the keys of the database."""
    authenticator = Authenticator(database)
    authenticator.verifier.start()
    await until(lambda: authenticator.listener.watch is not None)
    settings = {"models": MODELS, **config}
    async with world(database=database, authenticator=authenticator, **settings) as served:
        yield served
    await authenticator.close()


@pytest.fixture
async def served(database: PostgresSettings) -> AsyncIterator[World]:
    async with gateway(database) as made:
        yield made


@pytest.fixture
async def http(served: World) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=served.url, timeout=20) as made:
        yield made


@pytest.fixture
async def store(database: PostgresSettings) -> AsyncIterator[ApiKeyStore]:
    pool = build_pool(database)
    yield ApiKeyStore(pool)
    await pool.close()


@pytest.fixture
async def connection(database: PostgresSettings) -> AsyncIterator[asyncpg.Connection]:
    opened = await connect(database, application_name="tests")
    yield opened
    await opened.close()


def by(credential: str) -> dict[str, str]:
    return {"authorization": f"Bearer {credential}"}


async def make(http: httpx.AsyncClient, who: str = ADA, **fields: Any) -> dict[str, Any]:
    """Make a key of one's own."""
    answer = await http.post("/v1/keys", json={"name": "ci", **fields}, headers=by(who))
    assert answer.status_code == 200, answer.text
    made: dict[str, Any] = answer.json()
    return made


async def chat(http: httpx.AsyncClient, key: str, model: str = "small") -> int:
    """Return the status that a completion gets."""
    return (await http.post(CHAT, json=ASK | {"model": model}, headers=by(key))).status_code


def refusal(answer: httpx.Response, status: int, param: str | None = None) -> str:
    """Check a refusal; return its message."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    return str(error["message"])


# One's own keys.


async def test_the_life_of_a_key(http: httpx.AsyncClient, served: World) -> None:
    expires_at = int(time.time()) + 3600
    made = await make(
        http,
        note="for the nightly report",
        models=["small"],
        limits={"requests_per_minute": 50},
        bodies="metadata",
        expires_at=expires_at,
    )
    secret = made.pop("key")
    assert made == {
        "id": made["id"],
        "object": "api_key",
        "name": "ci",
        "note": "for the nightly report",
        "owner": "ada",
        "prefix": secret.split("-")[1],
        "status": "valid",
        "permissions": ["comp-ai:user"],
        "models": ["small"],
        "limits": {"requests_per_minute": 50},
        "bodies": "metadata",
        "created_at": made["created_at"],
        "created_by": "ada",
        "expires_at": expires_at,
        "rotated_at": None,
        "revoked_at": None,
        "last_used_at": None,
        "earlier_secrets": [],
    }
    assert await chat(http, secret) == 200
    assert await chat(http, secret, "large") == 404
    assert served.records[-1].principal_id == "ada"
    assert str(served.records[-1].api_key_id) == made["id"]
    assert served.records[-1].bodies == "metadata"

    shown = (await http.get(f"/v1/keys/{made['id']}", headers=by(ADA))).json()
    assert shown == made

    answer = await http.post(
        f"/v1/keys/{made['id']}",
        json={"name": "report", "note": None, "models": ["small", "large"]},
        headers=by(ADA),
    )
    changed = {"name": "report", "note": None, "models": ["large", "small"]}
    assert answer.json() == made | changed

    revoked = (await http.post(f"/v1/keys/{made['id']}/revoke", headers=by(ADA))).json()
    assert revoked["status"] == "revoked"
    assert revoked["revoked_at"] is not None
    again = (await http.post(f"/v1/keys/{made['id']}/revoke", headers=by(ADA))).json()
    assert again == revoked
    shown = (await http.get(f"/v1/keys/{made['id']}", headers=by(ADA))).json()
    assert shown["status"] == "revoked"
    for step, body in (("", {"name": "x"}), ("/rotate", {"overlap_s": 0})):
        answer = await http.post(f"/v1/keys/{made['id']}{step}", json=body, headers=by(ADA))
        assert "revoked" in refusal(answer, 400, "key_id")


async def test_lists_have_pages_and_only_what_is_ones_own(http: httpx.AsyncClient) -> None:
    ids = [(await make(http, name=f"k{n}"))["id"] for n in range(5)]
    await make(http, BOB)

    async def listed(query: str, who: str = ADA) -> dict[str, Any]:
        answer = await http.get(f"/v1/keys?{query}", headers=by(who))
        assert answer.status_code == 200, answer.text
        page: dict[str, Any] = answer.json()
        return page

    first = await listed("limit=2")
    assert [key["id"] for key in first["data"]] == ids[:2:-1]
    assert (first["object"], first["has_more"]) == ("list", True)
    rest = await listed(f"limit=5&after={first['last_id']}")
    assert [key["id"] for key in rest["data"]] == ids[2::-1]
    assert not rest["has_more"]
    assert [key["id"] for key in (await listed("order=asc"))["data"]] == ids
    assert len((await listed("", BOB))["data"]) == 1
    assert all("key" not in key for key in first["data"])


@pytest.mark.parametrize(
    ("query", "param"),
    [("limit=0", "limit"), ("order=up", "order"), ("after=x", "after"), ("owner=bob", "owner")],
)
async def test_a_wrong_query_is_refused_by_name(
    http: httpx.AsyncClient, query: str, param: str
) -> None:
    refusal(await http.get(f"/v1/keys?{query}", headers=by(ADA)), 400, param)


async def test_rotation_overlaps_for_as_long_as_is_named(
    http: httpx.AsyncClient, store: ApiKeyStore
) -> None:
    made = await make(http, limits={"requests_per_minute": 50})
    address = f"/v1/keys/{made['id']}/rotate"
    answer = await http.post(address, json={"overlap_s": 3600}, headers=by(ADA))
    assert answer.headers["cache-control"] == "no-store"
    second = answer.json()
    assert (second["id"], second["name"], second["limits"]) == (
        made["id"],
        "ci",
        {"requests_per_minute": 50},
    )
    assert second["key"] != made["key"]
    [earlier] = second["earlier_secrets"]
    assert earlier["prefix"] == made["prefix"]
    assert abs(earlier["expires_at"] - time.time() - 3600) < 60
    assert [await chat(http, key) for key in (made["key"], second["key"])] == [200, 200]
    # It is one key, not two.
    listed = (await http.get("/v1/keys", headers=by(ADA))).json()["data"]
    assert [key["id"] for key in listed] == [made["id"]]

    # What it may do it may do with both; less at once with both.
    answer = await http.post(f"/v1/keys/{made['id']}", json={"models": ["large"]}, headers=by(ADA))
    assert answer.status_code == 200
    for key in (made["key"], second["key"]):
        async with asyncio.timeout(20):
            while await chat(http, key) != 404:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert await chat(http, key, "large") == 200

    third = (await http.post(address, json={"overlap_s": 0}, headers=by(ADA))).json()
    assert third["earlier_secrets"] == []
    for key in (made["key"], second["key"]):
        async with asyncio.timeout(20):
            while await chat(http, key, "large") != 401:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    assert await chat(http, third["key"], "large") == 200


async def test_an_overlap_ends_with_the_key(http: httpx.AsyncClient) -> None:
    expires_at = int(time.time()) + 60
    made = await make(http, expires_at=expires_at)
    answer = await http.post(
        f"/v1/keys/{made['id']}/rotate", json={"overlap_s": 3600}, headers=by(ADA)
    )
    assert answer.json()["earlier_secrets"][0]["expires_at"] == expires_at


async def test_overlaps_are_bounded(database: PostgresSettings) -> None:
    async with (
        gateway(database, keys={"max_overlap_s": 10}) as served,
        httpx.AsyncClient(base_url=served.url) as http,
    ):
        made = await make(http)
        address = f"/v1/keys/{made['id']}/rotate"
        answer = await http.post(address, json={"overlap_s": 11}, headers=by(ADA))
        assert "from 0 to 10" in refusal(answer, 400, "overlap_s")
        refusal(await http.post(address, json={}, headers=by(ADA)), 400, "overlap_s")
        for _ in range(5):
            answer = await http.post(address, json={"overlap_s": 10}, headers=by(ADA))
            assert answer.status_code == 200
        answer = await http.post(address, json={"overlap_s": 10}, headers=by(ADA))
        assert "earlier secrets" in refusal(answer, 400, "overlap_s")
        # What was refused changed nothing.
        assert await chat(http, made["key"]) == 200


async def test_nobody_touches_keys_of_others(http: httpx.AsyncClient) -> None:
    made = await make(http)
    address = f"/v1/keys/{made['id']}"
    nothing = [f"/v1/keys/{new_id()}", "/v1/keys/x", address]
    messages = set()
    for at in nothing:
        messages.add(refusal(await http.get(at, headers=by(BOB)), 404, "key_id"))
        for step, body in (("", {"name": "x"}), ("/rotate", {"overlap_s": 0}), ("/revoke", None)):
            answer = await http.post(f"{at}{step}", json=body, headers=by(BOB))
            messages.add(refusal(answer, 404, "key_id"))
    assert len(messages) == 1
    assert await chat(http, made["key"]) == 200


async def test_the_number_of_keys_is_bounded(database: PostgresSettings) -> None:
    async with (
        gateway(database, keys={"max_per_owner": 2}) as served,
        httpx.AsyncClient(base_url=served.url) as http,
    ):
        answers = await asyncio.gather(
            *(http.post("/v1/keys", json={"name": "k"}, headers=by(ADA)) for _ in range(6))
        )
        assert sorted(answer.status_code for answer in answers) == [200, 200, 400, 400, 400, 400]
        made = next(answer.json() for answer in answers if answer.status_code == 200)
        await http.post(f"/v1/keys/{made['id']}/revoke", headers=by(ADA))
        await make(http)
        await make(http, BOB)


async def test_the_life_of_a_secret_is_bounded(
    database: PostgresSettings, store: ApiKeyStore
) -> None:
    before = (await make_for_ever(store)).id
    async with (
        gateway(database, keys={"max_life_s": 3600}) as served,
        httpx.AsyncClient(base_url=served.url) as http,
    ):
        made = await make(http)
        latest = made["created_at"] + 3600
        assert made["expires_at"] == latest
        assert (await make(http, expires_at=latest - 60))["expires_at"] == latest - 60
        late = {"name": "k", "expires_at": latest + 60}
        message = refusal(
            await http.post("/v1/keys", json=late, headers=by(ADA)), 400, "expires_at"
        )
        assert "3600 s" in message
        at = f"/v1/keys/{made['id']}"
        for expires_at in (latest + 60, None):
            answer = await http.post(at, json={"expires_at": expires_at}, headers=by(ADA))
            refusal(answer, 400, "expires_at")
        answer = await http.post(at, json={"expires_at": latest - 60}, headers=by(ADA))
        assert answer.json()["expires_at"] == latest - 60
        # A key of before the bound lives on, and is bound once it has a new secret.
        at = f"/v1/keys/{before}"
        answer = await http.post(at, json={"note": "old"}, headers=by(ADA))
        assert answer.json()["expires_at"] is None
        rotated = await http.post(f"{at}/rotate", json={"overlap_s": 60}, headers=by(ADA))
        expires_at = rotated.json()["rotated_at"] + 3600
        assert rotated.json()["expires_at"] == pytest.approx(expires_at, abs=1)
        # An administrator is not bound.
        answer = await http.post(f"/admin{at[3:]}", json={"expires_at": None}, headers=by(ADMIN))
        assert answer.json()["expires_at"] is None
        body = {"name": "k", "owner": "ada"}
        answer = await http.post("/admin/keys", json=body, headers=by(ADMIN))
        assert answer.json()["expires_at"] is None


async def make_for_ever(store: ApiKeyStore) -> ApiKey:
    """Make a key of Ada's as one was made when nothing bound it."""
    return (await store.create(KeyTerms(name="k"), owner="ada", by=ROOT))[1]


async def test_a_key_that_makes_keys_gives_them_no_more_than_is_left_of_it(
    database: PostgresSettings,
) -> None:
    async with (
        gateway(database, keys={"max_life_s": 3600}) as served,
        httpx.AsyncClient(base_url=served.url) as http,
    ):
        expires_at = int(time.time()) + 600
        permissions = ["comp-ai:user", "comp-ai:keys"]
        parent = await make(http, permissions=permissions, expires_at=expires_at)
        assert (await make(http, parent["key"]))["expires_at"] == expires_at


# What a key may not do.


async def test_a_key_manages_no_keys_unless_it_was_said(http: httpx.AsyncClient) -> None:
    plain = (await make(http))["key"]
    for method, at in (("GET", "/v1/keys"), ("POST", "/v1/keys"), ("GET", f"/v1/keys/{new_id()}")):
        answer = await http.request(method, at, json={"name": "x"}, headers=by(plain))
        assert "comp-ai:keys" in refusal(answer, 403)
    manager = (await make(http, permissions=["comp-ai:user", "comp-ai:keys"]))["key"]
    child = await make(http, manager)
    assert (child["owner"], child["permissions"]) == ("ada", ["comp-ai:user"])
    assert await chat(http, child["key"]) == 200


async def test_a_key_gives_no_more_than_it_has(http: httpx.AsyncClient, store: ApiKeyStore) -> None:
    expires_at = int(time.time()) + 3600
    manager = await make(
        http,
        permissions=["comp-ai:user", "comp-ai:keys"],
        models=["small"],
        expires_at=expires_at,
    )
    child = await make(http, manager["key"])
    assert (child["models"], child["expires_at"]) == (["small"], expires_at)
    wider = [
        ({"permissions": ["comp-ai:admin"]}, "permissions"),
        ({"models": ["large"]}, "models"),
        ({"models": ["small", "large"]}, "models"),
        ({"expires_at": expires_at + 1}, "expires_at"),
    ]
    for fields, param in wider:
        headers = by(manager["key"])
        answer = await http.post("/v1/keys", json={"name": "x", **fields}, headers=headers)
        refusal(answer, 403, param)
        answer = await http.post(f"/v1/keys/{child['id']}", json=fields, headers=headers)
        refusal(answer, 403, param)
    for cleared, param in (("models", "models"), ("expires_at", "expires_at")):
        answer = await http.post(
            f"/v1/keys/{manager['id']}", json={cleared: None}, headers=by(manager["key"])
        )
        refusal(answer, 403, param)
    # Nor does it lay hands on a key of its owner that may do more.
    strong = (await make(http))["id"]
    answer = await http.post(
        f"/v1/keys/{strong}/rotate", json={"overlap_s": 0}, headers=by(manager["key"])
    )
    refusal(answer, 403, "models")
    assert await _names(http, strong) == "ci"


async def _names(http: httpx.AsyncClient, key_id: str) -> str:
    return str((await http.get(f"/v1/keys/{key_id}", headers=by(ADA))).json()["name"])


async def test_a_user_gives_no_more_than_he_has(http: httpx.AsyncClient, served: World) -> None:
    served.authenticator.principals[ADA] = principal("ada", models=frozenset({"small"}))
    for fields, param in (
        ({"permissions": ["comp-ai:auditor"]}, "permissions"),
        ({"permissions": ["comp-ai:admin"]}, "permissions"),
        ({"models": ["large"]}, "models"),
    ):
        answer = await http.post("/v1/keys", json={"name": "x", **fields}, headers=by(ADA))
        refusal(answer, 403, param)
    assert (await make(http))["models"] == ["small"]


async def test_an_administrators_key_is_not_rotated_with_its_owners_token(
    http: httpx.AsyncClient, store: ApiKeyStore
) -> None:
    terms = KeyTerms(name="strong", permissions=ADMINS)
    _, key = await store.create(terms, owner="ada", by=ROOT)
    for step, body in (("/rotate", {"overlap_s": 0}), ("", {"expires_at": None})):
        answer = await http.post(f"/v1/keys/{key.id}{step}", json=body, headers=by(ADA))
        refusal(answer, 403, "permissions")
    assert (await http.post(f"/v1/keys/{key.id}/revoke", headers=by(ADA))).status_code == 200


async def test_a_key_with_limits_makes_no_others_and_keeps_its_limits(
    http: httpx.AsyncClient, store: ApiKeyStore
) -> None:
    permissions = frozenset({Permission.USER, Permission.KEYS})
    limits = LimitPolicy(requests_per_minute=50)
    terms = KeyTerms(name="limited", permissions=permissions, limits=limits)
    plain, key = await store.create(terms, owner="ada", by=ROOT)
    refusal(await http.post("/v1/keys", json={"name": "x"}, headers=by(plain)), 403)
    for wider in (None, {}, {"requests_per_minute": 51}, {"concurrency": 1}):
        answer = await http.post(f"/v1/keys/{key.id}", json={"limits": wider}, headers=by(plain))
        assert "requests_per_minute" in refusal(answer, 403, "limits")
    answer = await http.post(
        f"/v1/keys/{key.id}",
        json={"limits": {"requests_per_minute": 49, "concurrency": 2}},
        headers=by(plain),
    )
    assert answer.status_code == 200


async def test_limits_of_a_key_hold_for_all_its_secrets_and_for_no_other_key(
    http: httpx.AsyncClient,
) -> None:
    made = await make(http, limits={"requests_per_minute": 2})
    assert await chat(http, made["key"]) == 200
    address = f"/v1/keys/{made['id']}/rotate"
    answer = await http.post(address, json={"overlap_s": 60}, headers=by(ADA))
    rotated = answer.json()["key"]
    # A new secret is no new allowance.
    assert await chat(http, rotated) == 200
    assert [await chat(http, key) for key in (made["key"], rotated)] == [429, 429]
    assert await chat(http, (await make(http))["key"]) == 200


# Everybody's keys.


async def test_an_administrator_manages_keys_of_anybody(
    http: httpx.AsyncClient, served: World
) -> None:
    fields = {"name": "svc", "owner": "reports", "permissions": ["comp-ai:user"]}
    made = (await http.post("/admin/keys", json=fields, headers=by(ADMIN))).json()
    assert (made["owner"], made["created_by"]) == ("reports", "root")
    assert await chat(http, made["key"]) == 200
    assert served.records[-1].principal_id == "reports"
    await make(http)
    listed = (await http.get("/admin/keys", headers=by(ADMIN))).json()["data"]
    assert {key["owner"] for key in listed} == {"reports", "ada"}
    [one] = (await http.get("/admin/keys?owner=reports", headers=by(ADMIN))).json()["data"]
    assert one["id"] == made["id"]
    at = f"/admin/keys/{made['id']}"
    assert (await http.get(at, headers=by(ADMIN))).json()["owner"] == "reports"
    answer = await http.post(at, json={"note": "seen"}, headers=by(ADMIN))
    assert answer.json()["note"] == "seen"
    rotated = await http.post(f"{at}/rotate", json={"overlap_s": 60}, headers=by(ADMIN))
    assert await chat(http, rotated.json()["key"]) == 200
    assert (await http.post(f"{at}/revoke", headers=by(ADMIN))).json()["status"] == "revoked"
    answer = await http.post("/admin/keys", json={"name": "x"}, headers=by(ADMIN))
    refusal(answer, 400, "owner")


async def test_nobody_else_may(http: httpx.AsyncClient, served: World) -> None:
    made = await make(http, permissions=["comp-ai:user", "comp-ai:keys"])
    at = f"/admin/keys/{made['id']}"
    served.authenticator.principals[BOB] = principal(
        "bob", permissions=frozenset({Permission.USER, Permission.AUDITOR})
    )
    for who in (ADA, BOB, made["key"]):
        answers = [
            await http.get("/admin/keys", headers=by(who)),
            await http.post("/admin/keys", json={"name": "x", "owner": "y"}, headers=by(who)),
            await http.get(at, headers=by(who)),
            await http.post(at, json={"name": "x"}, headers=by(who)),
            await http.post(f"{at}/rotate", json={"overlap_s": 0}, headers=by(who)),
            await http.post(f"{at}/revoke", headers=by(who)),
        ]
        for answer in answers:
            assert "comp-ai:admin" in refusal(answer, 403)


# What is refused, and what is left behind.


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"name": None}, "name"),
        ({"name": ""}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": "x" * 201}, "name"),
        ({"name": 1}, "name"),
        ({"owner": "bob"}, "owner"),
        ({"key": "cai-mine"}, "key"),
        ({"note": "x" * 1001}, "note"),
        ({"models": []}, "models"),
        ({"models": "small"}, "models"),
        ({"models": [1]}, "models.0"),
        ({"permissions": []}, "permissions"),
        ({"permissions": ["root"]}, "permissions.0"),
        ({"limits": []}, "limits"),
        ({"limits": {"requests_per_minute": 0}}, "limits.requests_per_minute"),
        ({"limits": {"requests_per_minute": "5"}}, "limits.requests_per_minute"),
        ({"limits": {"wishes": 3}}, "limits.wishes"),
        ({"expires_at": 1}, "expires_at"),
        ({"expires_at": 10**30}, "expires_at"),
        ({"expires_at": "tomorrow"}, "expires_at"),
    ],
)
async def test_a_wrong_field_is_refused_by_name(
    http: httpx.AsyncClient, fields: dict[str, Any], param: str
) -> None:
    answer = await http.post("/v1/keys", json={"name": "ci", **fields}, headers=by(ADA))
    refusal(answer, 400, param)


async def test_a_secret_is_kept_nowhere(
    http: httpx.AsyncClient,
    served: World,
    connection: asyncpg.Connection,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(0)
    headers = by(ADA) | {"idempotency-key": "once"}
    made = await http.post("/v1/keys", json={"name": "ci"}, headers=headers)
    assert made.headers["cache-control"] == "no-store"
    again = await http.post("/v1/keys", json={"name": "ci"}, headers=headers)
    rotated = await http.post(
        f"/v1/keys/{made.json()['id']}/rotate", json={"overlap_s": 60}, headers=headers
    )
    secrets = [answer.json()["key"] for answer in (made, again, rotated)]
    # Nothing was kept to be sent again.
    assert len(set(secrets)) == 3
    assert await chat(http, secrets[0]) == 200
    tables = await connection.fetch(
        "select table_name from information_schema.tables where table_schema = 'comp_ai'"
    )
    assert len(tables) > 10
    kept = [served.lines.getvalue(), caplog.text, repr(served.records)]
    for (table,) in tables:
        rows = await connection.fetch(f'select t::text from comp_ai."{table}" as t')
        kept += [row[0] for row in rows]
    for secret in secrets:
        last = secret.rpartition("-")[2]
        assert not any(last in text for text in kept)
    for record in served.records[:3]:
        assert record.request_body is None
        assert record.response_text is None


async def test_each_act_leaves_its_row(
    http: httpx.AsyncClient, connection: asyncpg.Connection
) -> None:
    made = await make(http)
    at = f"/v1/keys/{made['id']}"
    await http.post(at, json={"limits": {"concurrency": 2}}, headers=by(ADA))
    await http.post(f"{at}/rotate", json={"overlap_s": 60}, headers=by(ADA))
    headers = by(ADMIN) | {"x-request-id": "the-end", "x-real-ip": "192.0.2.9"}
    await http.post(f"/admin/keys/{made['id']}/revoke", headers=headers)
    await http.post(f"/admin/keys/{made['id']}/revoke", headers=headers)
    # A refusal changes nothing, and is no act.
    await http.post(f"{at}/rotate", json={"overlap_s": 60}, headers=by(BOB))
    rows = await connection.fetch(
        "select * from comp_ai.audit_log where action like 'key.%' order by seq"
    )
    assert [(row["action"], row["actor_id"]) for row in rows] == [
        ("key.create", "ada"),
        ("key.update", "ada"),
        ("key.rotate", "ada"),
        ("key.revoke", "root"),
    ]
    assert {row["target"] for row in rows} == {made["id"]}
    created, updated, rotated, revoked = rows
    assert created["before"] is None
    assert json.loads(updated["before"])["limits"] is None
    assert json.loads(updated["after"])["limits"] == {"concurrency": 2}
    before, after = json.loads(rotated["before"]), json.loads(rotated["after"])
    assert before["prefix"] == after["earlier_secrets"][0]["prefix"] != after["prefix"]
    assert (revoked["request_id"], revoked["client_address"]) == ("the-end", "192.0.2.9")
    assert json.loads(revoked["after"])["status"] == "revoked"
    assert (await verify(connection)).intact


async def test_without_postgresql_nothing_is_managed(database: PostgresSettings) -> None:
    async with world() as served, httpx.AsyncClient(base_url=served.url) as http:
        served.authenticator.principals[ADA] = principal("ada")
        answer = await http.post("/v1/keys", json={"name": "x"}, headers=by(ADA))
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "store_unavailable"


# Revocation at several gateways.


async def test_a_revoked_key_is_refused_by_every_gateway(
    database: PostgresSettings, store: ApiKeyStore
) -> None:
    async with AsyncExitStack() as stack:
        gateways = [await stack.enter_async_context(gateway(database)) for _ in range(2)]
        clients = [
            await stack.enter_async_context(httpx.AsyncClient(base_url=one.url, timeout=20))
            for one in gateways
        ]
        made = await make(clients[0])
        assert [await chat(one, made["key"]) for one in clients] == [200, 200]
        answer = await clients[0].post(f"/v1/keys/{made['id']}/revoke", headers=by(ADA))
        assert answer.status_code == 200
        await _refused(clients, made["key"])
        # And stays so: the attack that plays an old key again.
        assert [await chat(one, made["key"]) for one in clients] == [401, 401]


async def _refused(clients: Sequence[httpx.AsyncClient], key: str) -> None:
    begun_s = time.perf_counter()

    async def refused(one: httpx.AsyncClient) -> None:
        while await chat(one, key) != 401:  # noqa: ASYNC110 - of another gateway
            await asyncio.sleep(0.005)

    async with asyncio.timeout(20):
        await asyncio.gather(*map(refused, clients))
    print(f"refused by every gateway after {(time.perf_counter() - begun_s) * 1000:.0f} ms")


async def test_nothing_tells_a_revoked_key_from_one_that_never_was(
    http: httpx.AsyncClient, store: ApiKeyStore
) -> None:
    revoked, key = await store.create(KeyTerms(name="r"), owner="ada", by=ROOT)
    soon = utc_now() + timedelta(milliseconds=200)
    expired, _ = await store.create(KeyTerms(name="e", expires_at=soon), owner="ada", by=ROOT)
    good, _ = await store.create(KeyTerms(name="g"), owner="ada", by=ROOT)
    await store.revoke(key.id, by=ROOT)
    await until(lambda: utc_now() > soon)
    wrong = good[:-1] + ("A" if good[-1] != "A" else "B")
    answers = [
        await http.post(CHAT, json=ASK, headers=by(plain) | {"x-request-id": "same"})
        for plain in (revoked, expired, wrong, generate_key()[0])
    ]
    assert {answer.status_code for answer in answers} == {401}
    assert len({answer.text for answer in answers}) == 1
    volatile = {"server-timing", "date"}
    headers = [
        {name: value for name, value in answer.headers.items() if name not in volatile}
        for answer in answers
    ]
    assert all(one == headers[0] for one in headers)
