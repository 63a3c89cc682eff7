"""`GET /v1/me`, for each kind of credential."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from serve_app.audit.act import OPERATOR, Actor
from serve_app.config import LimitPolicy
from serve_app.identity.api_key_verifier import ApiKeyVerifier
from serve_app.identity.api_keys import ApiKeyStore, KeyTerms
from serve_app.identity.authenticator import BearerAuthenticator
from serve_app.identity.principal import Permission, Principal
from serve_app.records import PrincipalKind
from serve_app.settings import PostgresSettings
from tests.integration.fakes import World, client, principal, world

BOOTSTRAP = "bootstrap-key-of-thirty-two-characters"
MODELS = [
    {"name": "small", "app": "model-small", "aliases": ["s"]},
    {"name": "secret", "app": "model-secret", "restricted": True},
]
POLICY: dict[str, Any] = {
    "models": MODELS,
    "access": {"groups": {"lab": {"permissions": ["comp-ai:user"], "models": ["s*"]}}},
    "limits": {
        "default": {"requests_per_minute": 5},
        "groups": {"lab": {"members": "each", "tokens_per_day": 1000}},
        "currency": "EUR",
        "everyone": {"cost_per_month": "2.5"},
    },
}


@pytest.fixture
async def served(database: PostgresSettings) -> AsyncIterator[World]:
    async with world(database=database, **POLICY) as made:
        yield made


@pytest.fixture
async def http(served: World) -> AsyncIterator[httpx.AsyncClient]:
    async with client(served) as opened:
        yield opened


async def me(http: httpx.AsyncClient, key: str) -> dict[str, Any]:
    response = await http.get("/v1/me", headers={"authorization": f"Bearer {key}"})
    assert response.status_code == 200, response.text
    return dict(response.json())


async def test_a_token_is_told_what_its_roles_and_groups_give(
    served: World, http: httpx.AsyncClient
) -> None:
    served.authenticator.principals["token"] = Principal(
        id="ann",
        kind=PrincipalKind.USER,
        permissions=frozenset(),
        roles=frozenset({"comp-ai:auditor", "offline_access"}),
        groups=frozenset({"lab", "choir"}),
        client_id="web",
    )
    said = await me(http, "token")
    limits = said.pop("limits")
    assert said == {
        "object": "me",
        "id": "ann",
        "kind": "user",
        "client_id": "web",
        "roles": ["comp-ai:auditor"],
        "groups": ["choir", "lab"],
        "permissions": ["comp-ai:user", "comp-ai:auditor"],
        "models": ["small", "secret"],
        "api_key": None,
        "bodies": {"small": "full", "secret": "full"},
    }
    assert {(each["for"], each["limit"], each["allowed"], each["currency"]) for each in limits} == {
        ("everyone together", "cost_per_month", 2.5, "EUR"),
        ("you", "requests_per_minute", 5, None),
        ("each of the group `lab`", "tokens_per_day", 1000, None),
    }
    assert all(each["remaining"] == each["allowed"] for each in limits)


async def test_what_is_left_gets_less_with_use(served: World, http: httpx.AsyncClient) -> None:
    served.authenticator.principals["token"] = principal("ann")
    for _ in range(2):
        answer = await http.post(
            "/v1/completions",
            headers={"authorization": "Bearer token"},
            json={"model": "small", "prompt": "p", "max_tokens": 2},
        )
        assert answer.status_code == 200
    (limit,) = [each for each in (await me(http, "token"))["limits"] if each["for"] == "you"]
    assert (limit["allowed"], limit["remaining"]) == (5, 3)
    assert 0 < limit["reset_s"] <= 60


async def test_who_may_do_nothing_is_told_so(served: World, http: httpx.AsyncClient) -> None:
    served.authenticator.principals["stranger"] = principal("eve", permissions=frozenset())
    said = await me(http, "stranger")
    assert (said["id"], said["permissions"], said["models"], said["roles"]) == ("eve", [], [], [])


async def test_without_a_credential_nobody_is_told_anything(http: httpx.AsyncClient) -> None:
    assert (await http.get("/v1/me", headers={"authorization": "Bearer x"})).status_code == 401


async def test_an_api_key_is_told_its_scope_and_never_itself(
    served: World, http: httpx.AsyncClient
) -> None:
    store = ApiKeyStore(served.database)
    expires_at = datetime.now(UTC) + timedelta(days=1)
    plain, key = await store.create(
        KeyTerms(
            name="nightly",
            models=frozenset({"secret"}),
            expires_at=expires_at,
            limits=LimitPolicy(concurrency=2),
        ),
        owner="reports",
        by=Actor(id="tests", kind=OPERATOR),
    )
    _real(served, store)
    response = await http.get("/v1/me", headers={"authorization": f"Bearer {plain}"})
    said = response.json()
    assert (said["id"], said["kind"], said["client_id"]) == ("reports", "api_key", None)
    assert (said["permissions"], said["models"]) == (["comp-ai:user"], ["secret"])
    assert said["api_key"] == {
        "id": str(key.id),
        "prefix": key.prefix,
        "name": "nightly",
        "expires_at": int(expires_at.timestamp()),
    }
    assert ("your API key", "concurrency", 2) in {
        (each["for"], each["limit"], each["allowed"]) for each in said["limits"]
    }
    assert plain.rsplit("-", 1)[1] not in response.text


async def test_the_bootstrap_key_is_an_admin(served: World, http: httpx.AsyncClient) -> None:
    _real(served, ApiKeyStore(served.database))
    said = await me(http, BOOTSTRAP)
    assert (said["id"], said["kind"], said["api_key"]) == ("bootstrap", "api_key", None)
    assert said["permissions"] == [str(permission) for permission in Permission]
    assert said["models"] == ["small", "secret"]


async def test_parameters_are_refused(served: World, http: httpx.AsyncClient) -> None:
    response = await http.get("/v1/me?who=ann")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "who"


def _real(served: World, store: ApiKeyStore) -> None:
    """Put the real check of API keys in the place of the fake one."""
    verifier = ApiKeyVerifier(store, bootstrap_key=BOOTSTRAP)
    served.authenticator.authenticate = BearerAuthenticator(None, verifier).authenticate  # type: ignore[method-assign]
