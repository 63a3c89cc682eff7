"""The local issuer's endpoints and files."""

from __future__ import annotations

import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.errors import AuthenticationFailed, ConfigError, IdentityUnavailable
from serve_app.identity.claims import TrustedIssuer
from serve_app.identity.local_issuer import (
    IssuerConfig,
    create_issuer,
    fetch_token,
    find_token_endpoint,
    load_clients,
    mint_token,
)
from serve_app.identity.oidc import OidcVerifier
from serve_app.identity.principal import Permission
from serve_app.identity.signing_key import SigningKey
from serve_app.records import PrincipalKind

URL = "http://issuer.test"
GRANT = {"grant_type": "client_credentials"}


@pytest.fixture
async def http(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    app = create_issuer(IssuerConfig(folder=tmp_path / "issuer", issuer_url=URL))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=URL) as client:
        yield client


@pytest.fixture
def folder(http: httpx.AsyncClient, tmp_path: Path) -> Path:
    return tmp_path / "issuer"


@pytest.fixture
def credentials(folder: Path) -> tuple[str, str]:
    (client,) = load_clients(folder)
    return client.client_id, client.secret.get_secret_value()


def verifier(http: httpx.AsyncClient) -> OidcVerifier:
    audience = "comp-ai-service"
    trusted = TrustedIssuer(
        url=URL, audience=audience, client_id=audience, authorized_parties=(audience,)
    )
    return OidcVerifier(trusted, http)


async def test_fetched_token_is_good(http: httpx.AsyncClient, credentials: tuple[str, str]) -> None:
    endpoint = await find_token_endpoint(URL, http)
    principal = await verifier(http).verify(await fetch_token(endpoint, *credentials, http))
    assert principal.id == "service-account-comp-ai-service"
    assert principal.kind is PrincipalKind.SERVICE
    assert principal.roles == {Permission.USER}


async def test_minted_token_is_good(http: httpx.AsyncClient, folder: Path) -> None:
    token = mint_token(
        folder,
        issuer_url=URL,
        audience="comp-ai-service",
        subject="ada",
        roles=["comp-ai:admin", "comp-ai:model:small"],
        expires_in_s=60,
    )
    principal = await verifier(http).verify(token)
    assert (principal.id, principal.kind) == ("ada", PrincipalKind.USER)
    assert principal.roles == {"comp-ai:admin", "comp-ai:model:small"}


async def test_form_credentials_and_answer(
    http: httpx.AsyncClient, credentials: tuple[str, str]
) -> None:
    client_id, secret = credentials
    response = await http.post(
        "/token", data=GRANT | {"client_id": client_id, "client_secret": secret}
    )
    assert response.status_code == 200
    assert response.headers["cache-control"] == "no-store"
    assert response.json().keys() == {"access_token", "token_type", "expires_in"}
    assert response.json()["expires_in"] == 300


@pytest.mark.parametrize(
    ("form", "sent", "status", "error"),
    [
        (GRANT, "none", 401, "invalid_client"),
        (GRANT, "wrong", 401, "invalid_client"),
        (GRANT, "unknown", 401, "invalid_client"),
        (GRANT | {"client_id": "comp-ai-service"}, "none", 401, "invalid_client"),
        ({}, "right", 400, "invalid_request"),
        ({"grant_type": "password"}, "right", 400, "unsupported_grant_type"),
        (GRANT | {"client_secret": "x"}, "right", 400, "invalid_request"),
        ({"grant_type": ["client_credentials"] * 2}, "right", 400, "invalid_request"),
        (GRANT | {"scope": "openid"}, "right", 400, "invalid_scope"),
        (GRANT | {"filler": "x" * 20_000}, "right", 413, "invalid_request"),
    ],
)
async def test_refusals(
    form: dict[str, Any],
    sent: str,
    status: int,
    error: str,
    http: httpx.AsyncClient,
    credentials: tuple[str, str],
) -> None:
    auth = {
        "none": None,
        "right": httpx.BasicAuth(*credentials),
        "wrong": httpx.BasicAuth(credentials[0], "wrong"),
        "unknown": httpx.BasicAuth("unknown", credentials[1]),
    }[sent]
    response = await http.post("/token", data=form or {"x": "y"}, auth=auth or httpx.Auth())
    assert (response.status_code, response.json()["error"]) == (status, error)
    assert credentials[1] not in response.text
    assert ("www-authenticate" in response.headers) is (status == 401)


@pytest.mark.parametrize("header", ["Basic", "Basic !!", "Basic YQ==", "Bearer abc", "Basic /w=="])
async def test_broken_basic_header(header: str, http: httpx.AsyncClient) -> None:
    response = await http.post("/token", data=GRANT, headers={"Authorization": header})
    assert (response.status_code, response.json()["error"]) == (401, "invalid_client")


async def test_other_content_type(http: httpx.AsyncClient) -> None:
    response = await http.post("/token", json=GRANT)
    assert (response.status_code, response.json()["error"]) == (400, "invalid_request")


async def test_fetch_reports_refusal_and_outage(http: httpx.AsyncClient) -> None:
    with pytest.raises(AuthenticationFailed, match="invalid_client"):
        await fetch_token(f"{URL}/token", "comp-ai-service", "wrong", http)
    with pytest.raises(IdentityUnavailable):
        await find_token_endpoint("http://issuer.test/other", http)
    async with httpx.AsyncClient() as real:
        with pytest.raises(IdentityUnavailable):
            await fetch_token("http://127.0.0.1:9/token", "a", "b", real)


def test_files_are_private_and_stay(folder: Path) -> None:
    names = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert names == {"signing-key.pem": 0o600, "clients.json": 0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert SigningKey.load_or_create(folder).kid == SigningKey.load_or_create(folder).kid
    assert load_clients(folder) == load_clients(folder)


def test_secrets_are_not_shown(folder: Path, credentials: tuple[str, str]) -> None:
    assert credentials[1] not in repr(load_clients(folder))
    (folder / "clients.json").write_text('{"clients": [{"client_id": "a", "secret": "short-one"}]}')
    with pytest.raises(ConfigError) as refusal:
        load_clients(folder)
    assert "short-one" not in str(refusal.value)
    (folder / "signing-key.pem").write_text("nonsense")
    with pytest.raises(ConfigError, match="P-256"):
        SigningKey.load_or_create(folder)
