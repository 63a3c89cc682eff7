"""Access tokens against an issuer that speaks real HTTP, comes, goes and rotates its keys."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from serve_app.errors import AuthenticationFailed, IdentityUnavailable
from serve_app.identity.authenticator import build_authenticator
from serve_app.identity.claims import TrustedIssuer
from serve_app.identity.jwks import KeyPolicy
from serve_app.identity.local_issuer import (
    fetch_token,
    find_token_endpoint,
    load_clients,
    mint_token,
)
from serve_app.identity.oidc import OidcVerifier
from serve_app.identity.principal import Permission, Principal
from serve_app.records import PrincipalKind
from serve_app.settings import load_settings
from tests.integration.forge import (
    ATTACKER_KEY,
    AUDIENCE,
    EC_KEY,
    PARTY,
    RSA_KEY,
    Issuer,
    good_claims,
    running_issuer,
    sign,
    wait_for,
)


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with running_issuer() as running:
        yield running


class Clock:
    def __init__(self, start: float = 1_000.0) -> None:
        self.time = start

    def __call__(self) -> float:
        return self.time


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=5) as client:
        yield client


def make_verifier(issuer: Issuer, http: httpx.AsyncClient, **options: Any) -> OidcVerifier:
    return OidcVerifier(trusted(issuer.url), http, **options)


def trusted(url: str, **more: Any) -> TrustedIssuer:
    fields = {"audience": AUDIENCE, "client_id": AUDIENCE, "authorized_parties": (PARTY,)}
    return TrustedIssuer(url=url, **(fields | more))


@pytest.mark.parametrize(
    ("key", "alg"), [(RSA_KEY, "RS256"), (RSA_KEY, "PS256"), (EC_KEY, "ES256")]
)
async def test_good_token_of_each_kind(
    key: Any, alg: str, issuer: Issuer, http: httpx.AsyncClient
) -> None:
    principal = await make_verifier(issuer, http).verify(sign(good_claims(issuer), key, alg))
    assert principal.roles == {"comp-ai:user", "offline_access"}


async def test_clock_skew_of_30_s_is_forgiven(issuer: Issuer, http: httpx.AsyncClient) -> None:
    now = Clock(float(int(time.time())))
    verifier = make_verifier(issuer, http, now=now)
    for change in ({"exp": int(now()) - 29}, {"nbf": int(now()) + 30}, {"iat": int(now()) + 30}):
        await verifier.verify(sign(good_claims(issuer, **change)))
    with pytest.raises(AuthenticationFailed, match="expired"):
        await verifier.verify(sign(good_claims(issuer, exp=int(now()) - 30)))


async def test_cached_token_still_expires(issuer: Issuer, http: httpx.AsyncClient) -> None:
    now = Clock(time.time())
    verifier = make_verifier(issuer, http, now=now)
    token = sign(good_claims(issuer))
    await verifier.verify(token)
    now.time += 331
    with pytest.raises(AuthenticationFailed, match="expired"):
        await verifier.verify(token)


async def test_rotation_fails_no_request(issuer: Issuer, http: httpx.AsyncClient) -> None:
    clock = Clock()
    verifier = make_verifier(issuer, http, clock=clock)
    outcomes: list[Principal] = []
    for generation in range(5):
        kid = f"generation-{generation}"
        new = ec.generate_private_key(ec.SECP256R1())
        # As Keycloak does: the new key signs at once, the old one stays published.
        issuer.keys = {**dict(list(issuer.keys.items())[-1:]), kid: new}
        clock.time += 31
        tokens = [sign(good_claims(issuer, jti=str(n)), new, "ES256", kid=kid) for n in range(20)]
        outcomes += await asyncio.gather(*(verifier.verify(token) for token in tokens))
    assert len(outcomes) == 100
    assert issuer.key_fetches == 5


async def test_background_refresh_finds_new_keys(issuer: Issuer, http: httpx.AsyncClient) -> None:
    verifier = make_verifier(issuer, http, key_policy=KeyPolicy(refresh_s=0.05))
    verifier.start()
    await asyncio.to_thread(issuer.wait_for_fetches, 3)
    await verifier.close()


async def test_flood_of_unknown_kids_is_one_fetch(issuer: Issuer, http: httpx.AsyncClient) -> None:
    clock = Clock()
    verifier = make_verifier(issuer, http, clock=clock)
    await verifier.verify(sign(good_claims(issuer)))
    clock.time += 31
    before = issuer.key_fetches
    flood = [sign(good_claims(issuer), ATTACKER_KEY, kid=f"unknown-{n}") for n in range(300)]
    answers = await asyncio.gather(*map(verifier.verify, flood), return_exceptions=True)
    assert all(isinstance(answer, AuthenticationFailed) for answer in answers)
    assert issuer.key_fetches == before + 1
    clock.time += 31
    await asyncio.gather(*map(verifier.verify, flood), return_exceptions=True)
    assert issuer.key_fetches == before + 2


async def test_outage_of_the_issuer_is_survived(issuer: Issuer, http: httpx.AsyncClient) -> None:
    clock = Clock()
    verifier = make_verifier(issuer, http, clock=clock)
    await verifier.verify(sign(good_claims(issuer)))
    issuer.stop()
    clock.time += 23 * 3600
    await verifier.verify(sign(good_claims(issuer, jti="new")))
    # Nobody can say now whether this key is wrong.
    with pytest.raises(IdentityUnavailable):
        await verifier.verify(sign(good_claims(issuer), ATTACKER_KEY, kid="new"))
    clock.time += 2 * 3600
    with pytest.raises(IdentityUnavailable):
        await verifier.verify(sign(good_claims(issuer, jti="later")))


async def test_starts_without_the_issuer_and_recovers(http: httpx.AsyncClient) -> None:
    issuer = Issuer()
    issuer.reserve()
    policy = KeyPolicy(first_retry_s=0.02, max_retry_s=0.05)
    verifier = make_verifier(issuer, http, key_policy=policy)
    verifier.start()
    token = sign(good_claims(issuer))
    with pytest.raises(IdentityUnavailable) as refusal:
        await verifier.verify(token)
    assert refusal.value.retry_after_s is not None
    issuer.start()
    try:
        await asyncio.to_thread(issuer.wait_for_fetches, 1)
        assert (await verifier.verify(token)).id == "2f6c1f0e-user"
    finally:
        await verifier.close()
        issuer.stop()


async def test_key_set_of_another_issuer_is_not_used(
    issuer: Issuer, http: httpx.AsyncClient
) -> None:
    elsewhere = f"{issuer.url}/.well-known/openid-configuration"
    named = trusted("https://keycloak.example/realms/a", discovery_url=elsewhere)
    verifier = OidcVerifier(named, http)
    with pytest.raises(IdentityUnavailable):
        await verifier.verify(sign(good_claims(issuer)))
    assert issuer.key_fetches == 0


@pytest.fixture
def local_issuer(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The local issuer as `comp-ai up` runs it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "serve_app.identity.local_issuer"]
    options = ["--folder", str(tmp_path / "issuer"), "--port", str(port)]
    process = subprocess.Popen([*command, *options])
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: answers(url) or process.poll() is not None)
        yield url, tmp_path / "issuer"
    finally:
        process.terminate()
        process.wait(10)


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/jwks").is_success
    except httpx.TransportError:
        return False


async def test_local_issuer_as_a_process(
    local_issuer: tuple[str, Path], http: httpx.AsyncClient
) -> None:
    url, folder = local_issuer
    (client,) = load_clients(folder)
    endpoint = await find_token_endpoint(url, http)
    fetched = await fetch_token(endpoint, client.client_id, client.secret.get_secret_value(), http)
    minted = mint_token(
        folder, issuer_url=url, audience=AUDIENCE, subject="ada", roles=(), expires_in_s=60
    )
    authenticator = build_authenticator(load_settings({"COMP_AI_OIDC_ISSUER": url}))
    authenticator.start()
    try:
        service = await authenticator.authenticate(f"Bearer {fetched}")
        user = await authenticator.authenticate(f"Bearer {minted}")
    finally:
        await authenticator.close()
    assert (service.kind, service.roles) == (PrincipalKind.SERVICE, {Permission.USER})
    assert (user.id, user.kind, user.permissions) == ("ada", PrincipalKind.USER, frozenset())
