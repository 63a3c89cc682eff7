"""Access tokens against an issuer that speaks real HTTP, comes, goes and rotates its keys."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
import uvicorn
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from fastapi import FastAPI

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
from serve_app.identity.oidc import MAX_TOKEN_CHARS, OidcVerifier
from serve_app.identity.principal import Permission, Principal
from serve_app.records import PrincipalKind
from serve_app.settings import load_settings

AUDIENCE = "comp-ai-service"
PARTY = "comp-ai-web"
RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
ATTACKER_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)


def public_jwk(private: Any, kid: str, **more: str) -> dict[str, Any]:
    public = private.public_key()
    algorithms = jwt.algorithms.get_default_algorithms()
    name = "RS256" if isinstance(private, rsa.RSAPrivateKey) else "ES256"
    return {**json.loads(algorithms[name].to_jwk(public)), "kid": kid, "use": "sig", **more}


@dataclass
class Issuer:
    """An issuer on a real port. `keys` may be changed while it runs."""

    keys: dict[str, Any] = field(default_factory=lambda: {"rsa": RSA_KEY, "ec": EC_KEY})
    key_fetches: int = 0
    port: int = 0
    _server: uvicorn.Server | None = None
    _thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/realms/test"

    def reserve(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    def start(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(self._app(), log_level="error", access_log=False)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [listener]}, daemon=True
        )
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._server.force_exit = True
            self._thread.join(10)
            self._server = None

    def wait_for_fetches(self, count: int) -> None:
        wait_for(lambda: self.key_fetches >= count)

    def _app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/realms/test/.well-known/openid-configuration")
        async def discovery() -> dict[str, str]:
            return {"issuer": self.url, "jwks_uri": f"{self.url}/certs"}

        @app.get("/realms/test/certs")
        async def certs() -> dict[str, Any]:
            self.key_fetches += 1
            return {"keys": [public_jwk(key, kid) for kid, key in self.keys.items()]}

        return app


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    issuer = Issuer()
    issuer.start()
    yield issuer
    issuer.stop()


@pytest.fixture(scope="module")
def steady_issuer() -> Iterator[Issuer]:
    """An issuer that no test stops or changes."""
    issuer = Issuer()
    issuer.start()
    yield issuer
    issuer.stop()


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


def good_claims(issuer: Issuer, **changes: Any) -> dict[str, Any]:
    now = int(time.time())
    claims = {
        "iss": issuer.url,
        "sub": "2f6c1f0e-user",
        "aud": [AUDIENCE, "account"],
        "azp": PARTY,
        "typ": "Bearer",
        "iat": now,
        "nbf": now,
        "exp": now + 300,
        "preferred_username": "ada",
        "realm_access": {"roles": ["comp-ai:user", "offline_access"]},
    } | changes
    return {name: value for name, value in claims.items() if value is not None}


def sign(claims: dict[str, Any], key: Any = RSA_KEY, alg: str = "RS256", **header: Any) -> str:
    headers = {"kid": "rsa" if alg[0] in "RP" else "ec"} | header
    return jwt.encode(claims, key, algorithm=alg, headers=headers)


def segment(value: Any) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def sign_hmac_with_public_key(claims: dict[str, Any]) -> str:
    pem = RSA_KEY.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    body = f"{segment({'alg': 'HS256', 'typ': 'JWT', 'kid': 'rsa'})}.{segment(claims)}"
    return f"{body}.{segment(hmac.digest(pem, body.encode(), hashlib.sha256))}"


def with_raw_payload(payload: bytes) -> str:
    """Return a token whose signature is right and whose payload is `payload`."""
    return jwt.PyJWS().encode(payload, RSA_KEY, "RS256", {"kid": "rsa", "typ": "JWT"})


def raw_claims(issuer: Issuer, **raw: str) -> bytes:
    """Return good claims as JSON with values put in as they are written."""
    marks = {name: f"@{name}@" for name in raw}
    text = json.dumps(good_claims(issuer) | marks)
    for name, value in raw.items():
        text = text.replace(f'"@{name}@"', value)
    return text.encode()


def unsigned(issuer: Issuer, alg: str) -> str:
    header = segment({"alg": alg, "typ": "JWT", "kid": "rsa"})
    return f"{header}.{segment(good_claims(issuer))}."


NOW = time.time
ATTACKS: dict[str, Callable[[Issuer], str]] = {
    "alg none": lambda i: unsigned(i, "none"),
    "alg None": lambda i: unsigned(i, "None"),
    "alg empty": lambda i: unsigned(i, ""),
    "HS256 with the public key": lambda i: sign_hmac_with_public_key(good_claims(i)),
    "algorithm of another key type": lambda i: sign(good_claims(i), EC_KEY, "ES256", kid="rsa"),
    "another key under a known kid": lambda i: sign(good_claims(i), ATTACKER_KEY),
    "other issuer": lambda i: sign(good_claims(i, iss="http://evil.example/realms/test")),
    "issuer as list": lambda i: with_raw_payload(raw_claims(i, iss=json.dumps([i.url]))),
    "no issuer": lambda i: sign(good_claims(i, iss=None)),
    "other audience": lambda i: sign(good_claims(i, aud="account")),
    "audience in part": lambda i: sign(good_claims(i, aud=AUDIENCE + "-2")),
    "no audience": lambda i: sign(good_claims(i, aud=None)),
    "other party": lambda i: sign(good_claims(i, azp="other")),
    "party as list": lambda i: sign(good_claims(i, azp=[PARTY])),
    "no party": lambda i: sign(good_claims(i, azp=None)),
    "expired": lambda i: sign(good_claims(i, exp=int(NOW()) - 31)),
    "no expiry": lambda i: sign(good_claims(i, exp=None)),
    "expiry as text": lambda i: sign(good_claims(i, exp="9999999999")),
    "expiry true": lambda i: with_raw_payload(raw_claims(i, exp="true")),
    "expiry NaN": lambda i: with_raw_payload(raw_claims(i, exp="NaN")),
    "expiry Infinity": lambda i: with_raw_payload(raw_claims(i, exp="Infinity")),
    "expiry beyond a float": lambda i: with_raw_payload(raw_claims(i, exp="1" + "0" * 400)),
    "not yet valid": lambda i: sign(good_claims(i, nbf=int(NOW()) + 60)),
    "issued in the future": lambda i: sign(good_claims(i, iat=int(NOW()) + 60)),
    "kid path traversal": lambda i: sign(good_claims(i), ATTACKER_KEY, kid="../../../dev/null"),
    "kid SQL": lambda i: sign(good_claims(i), ATTACKER_KEY, kid="' UNION SELECT 'x' --"),
    "kid empty": lambda i: sign(good_claims(i), kid=""),
    "kid huge": lambda i: sign(good_claims(i), kid="k" * 1000),
    "jku": lambda i: sign(good_claims(i), ATTACKER_KEY, kid="x", jku=f"{i.url}/evil"),
    "x5u": lambda i: sign(good_claims(i), ATTACKER_KEY, kid="x", x5u=f"{i.url}/evil"),
    "jwk": lambda i: sign(good_claims(i), ATTACKER_KEY, jwk=public_jwk(ATTACKER_KEY, "rsa")),
    "x5c": lambda i: sign(good_claims(i), x5c=["MIIB"]),
    "crit": lambda i: sign(good_claims(i), crit=["exp"]),
    "header typ": lambda i: sign(good_claims(i), typ="logout+jwt"),
    "huge": lambda i: sign(good_claims(i, filler="x" * MAX_TOKEN_CHARS)),
    "ID token of Keycloak": lambda i: sign(good_claims(i, typ="ID")),
    "ID token of another issuer": lambda i: sign(good_claims(i, typ=None, at_hash="abc")),
    "refresh token": lambda i: sign(good_claims(i, typ="Refresh")),
    "logout token": lambda i: sign(good_claims(i, typ="Logout")),
    "missing sub": lambda i: sign(good_claims(i, sub=None)),
    "empty sub": lambda i: sign(good_claims(i, sub="")),
    "sub with NUL": lambda i: sign(good_claims(i, sub="a\x00b")),
    "sub with line break": lambda i: sign(good_claims(i, sub="a\nlevel=info")),
    "truncated": lambda i: sign(good_claims(i))[:-20],
    "signature removed": lambda i: sign(good_claims(i)).rpartition(".")[0] + ".",
    "claims swapped": lambda i: ".".join(
        [
            sign(good_claims(i)).split(".")[0],
            segment(good_claims(i, sub="admin")),
            sign(good_claims(i)).split(".")[2],
        ]
    ),
    "garbage": lambda i: "garbage",
    "dots": lambda i: "..",
    "not ASCII": lambda i: "é.ü.\udcff",
    "deep header": lambda i: f"{segment(b'[' * 9000)}.e30.e30",
    "deep payload": lambda i: with_raw_payload(b"[" * 9000),
    "payload is a list": lambda i: with_raw_payload(b"[]"),
}


@pytest.mark.parametrize("attack", ATTACKS)
async def test_attack_is_refused(
    attack: str, steady_issuer: Issuer, http: httpx.AsyncClient
) -> None:
    issuer = steady_issuer
    verifier = make_verifier(issuer, http)
    token = ATTACKS[attack](issuer)
    assert (await verifier.verify(sign(good_claims(issuer)))).id == "2f6c1f0e-user"
    with pytest.raises(AuthenticationFailed) as refusal:
        await verifier.verify(token)
    for part in token.split("."):
        assert len(part) < 8 or part not in refusal.value.message


@pytest.mark.parametrize(
    ("key", "alg"), [(RSA_KEY, "RS256"), (RSA_KEY, "PS256"), (EC_KEY, "ES256")]
)
async def test_good_token_of_each_kind(
    key: Any, alg: str, issuer: Issuer, http: httpx.AsyncClient
) -> None:
    principal = await make_verifier(issuer, http).verify(sign(good_claims(issuer), key, alg))
    assert principal.permissions == {Permission.USER}


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


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


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
    assert (service.kind, service.permissions) == (PrincipalKind.SERVICE, {Permission.USER})
    assert (user.id, user.kind, user.permissions) == ("ada", PrincipalKind.USER, frozenset())
