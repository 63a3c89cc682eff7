"""What verified claims mean, and which published keys are used."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from serve_app.errors import AuthenticationFailed, IdentityUnavailable
from serve_app.identity.jwks import parse_jwks
from serve_app.identity.oidc import OidcVerifier, to_principal
from serve_app.identity.principal import Permission
from serve_app.identity.signing_key import SigningKey
from serve_app.records import PrincipalKind

ISSUER = "https://issuer.test/realms/a"


@pytest.mark.parametrize(
    ("claims", "permissions"),
    [
        ({}, set()),
        ({"realm_access": {"roles": ["comp-ai:user", "other"]}}, {Permission.USER}),
        ({"resource_access": {"us": {"roles": ["comp-ai:admin"]}}}, {Permission.ADMIN}),
        ({"resource_access": {"them": {"roles": ["comp-ai:admin"]}}}, set()),
        ({"roles": ["comp-ai:auditor", "admin"]}, {Permission.AUDITOR}),
        ({"scope": "openid comp-ai:user email"}, {Permission.USER}),
        ({"scope": ["comp-ai:user"]}, set()),
        ({"realm_access": {"roles": {"comp-ai:admin": True}}}, set()),
        ({"realm_access": "comp-ai:admin", "resource_access": [], "roles": 5}, set()),
        ({"realm_access": {"roles": ["comp-ai:administrator", "COMP-AI:ADMIN", None]}}, set()),
    ],
)
def test_roles_become_permissions(claims: dict[str, Any], permissions: set[Permission]) -> None:
    assert to_principal({"sub": "s"} | claims, "us").permissions == permissions


def test_groups_and_client_are_kept() -> None:
    principal = to_principal(
        {"sub": "s", "groups": ["/platform/team-a", "ops", 5], "azp": "web"}, "us"
    )
    assert principal.groups == {"platform/team-a", "ops"}
    assert principal.client_id == "web"
    assert to_principal({"sub": "s", "groups": {"a": 1}, "azp": ["web"]}, "us").client_id is None


def test_model_roles_restrict_models() -> None:
    roles = ["comp-ai:user", "comp-ai:model:small", "comp-ai:model:org/large"]
    assert to_principal({"sub": "s", "roles": roles}, "us").models == {"small", "org/large"}
    assert to_principal({"sub": "s", "roles": ["comp-ai:user"]}, "us").models is None


@pytest.mark.parametrize(
    ("claims", "kind"),
    [
        ({"sub": "s"}, PrincipalKind.USER),
        ({"sub": "s", "preferred_username": "service-account-x"}, PrincipalKind.SERVICE),
        ({"sub": "x", "azp": "x"}, PrincipalKind.SERVICE),
        ({"sub": "x", "client_id": "x"}, PrincipalKind.SERVICE),
        ({"sub": "x@clients", "gty": "client-credentials"}, PrincipalKind.SERVICE),
        ({"sub": "s", "azp": "web", "gty": ["password"]}, PrincipalKind.USER),
    ],
)
def test_kind_of_principal(claims: dict[str, Any], kind: PrincipalKind) -> None:
    assert to_principal(claims, "us").kind is kind


def rsa_jwk(bits: int) -> dict[str, Any]:
    public = rsa.generate_private_key(public_exponent=65537, key_size=bits).public_key()
    return json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(public))


def test_only_fit_keys_are_used() -> None:
    good = SigningKey.generate().to_jwk()
    k1 = ec.generate_private_key(ec.SECP256K1()).public_key()
    entries: list[Any] = [
        good | {"kid": "good"},
        rsa_jwk(2048) | {"kid": "rsa"},
        rsa_jwk(2048) | {"kid": "one algorithm", "alg": "RS512"},
        rsa_jwk(1024) | {"kid": "weak"},
        rsa_jwk(2048) | {"kid": "encrypts", "use": "enc"},
        rsa_jwk(2048) | {"kid": "encrypts too", "key_ops": ["encrypt"]},
        rsa_jwk(2048) | {"kid": "other algorithm", "alg": "RSA-OAEP"},
        {"kty": "oct", "k": "c2VjcmV0", "kid": "secret"},
        json.loads(jwt.algorithms.ECAlgorithm.to_jwk(k1)) | {"kid": "other curve"},
        {"kty": "EC", "crv": "P-256", "x": "AAAA", "y": 5, "kid": "broken"},
        {"kty": "RSA", "n": None, "kid": "broken too"},
        {name: value for name, value in good.items() if name != "kid"},
        rsa_jwk(2048) | {"kid": "good"},
        "not a key",
        None,
    ]
    keys = parse_jwks({"keys": entries})
    assert {kid: key.algorithms for kid, key in keys.items()} == {
        "good": {"ES256"},
        "rsa": {"RS256", "RS384", "RS512", "PS256"},
        "one algorithm": {"RS512"},
    }


def test_private_half_in_a_key_set_is_not_loaded() -> None:
    private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    leaked = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(private)) | {"kid": "k"}
    leaked.pop("key_ops", None)
    assert isinstance(parse_jwks({"keys": [leaked]})["k"].key, rsa.RSAPublicKey)


@pytest.mark.parametrize("document", [{}, {"keys": None}, {"keys": {}}])
def test_no_key_set(document: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no keys"):
        parse_jwks(document)


class Issuer:
    """The issuer at the transport's seam."""

    def __init__(self) -> None:
        self.key = SigningKey.generate()
        self.keys: Any = [self.key.to_jwk()]
        self.fetches = 0

    def http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.MockTransport(self._answer))

    def token(self, **changes: Any) -> str:
        claims = {"iss": ISSUER, "aud": "api", "sub": "s", "exp": time.time() + 300}
        return self.key.sign(claims | changes)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/.well-known/openid-configuration"):
            return httpx.Response(200, json={"issuer": ISSUER, "jwks_uri": f"{ISSUER}/certs"})
        self.fetches += 1
        return httpx.Response(200, json={"keys": self.keys})


async def test_cached_token_is_looked_at_again_after_a_minute() -> None:
    issuer, seconds = Issuer(), 0.0
    async with issuer.http() as http:
        verifier = OidcVerifier(ISSUER, "api", "api", (), http, clock=lambda: seconds)
        token = issuer.token()
        first = await verifier.verify(token)
        assert await verifier.verify(token) is first
        seconds = 60.0
        assert await verifier.verify(token) is not first


async def test_token_of_a_removed_key_is_refused() -> None:
    issuer, seconds = Issuer(), 0.0
    async with issuer.http() as http:
        verifier = OidcVerifier(ISSUER, "api", "api", (), http, clock=lambda: seconds)
        token = issuer.token()
        await verifier.verify(token)
        issuer.keys = [SigningKey.generate().to_jwk()]
        seconds = 61.0
        # A token of an unknown key makes the verifier look; from then on the old key is gone.
        with pytest.raises(AuthenticationFailed):
            await verifier.verify(SigningKey.generate().sign({"sub": "x"}))
        with pytest.raises(AuthenticationFailed):
            await verifier.verify(token)


async def test_an_empty_key_set_does_not_replace_a_good_one() -> None:
    issuer, seconds = Issuer(), 0.0
    async with issuer.http() as http:
        verifier = OidcVerifier(ISSUER, "api", "api", (), http, clock=lambda: seconds)
        await verifier.verify(issuer.token())
        issuer.keys, seconds = [], 61.0
        with pytest.raises(IdentityUnavailable):
            await verifier.verify(SigningKey.generate().sign({"sub": "x"}))
        await verifier.verify(issuer.token(jti="new"))


async def test_cache_is_bounded() -> None:
    issuer = Issuer()
    async with issuer.http() as http:
        verifier = OidcVerifier(ISSUER, "api", "api", (), http, cache_size=2)
        tokens = [issuer.token(jti=str(number)) for number in range(3)]
        principals = [await verifier.verify(token) for token in tokens]
        assert await verifier.verify(tokens[2]) is principals[2]
        assert await verifier.verify(tokens[0]) is not principals[0]


async def test_client_that_leaves_does_not_stop_the_fetch() -> None:
    issuer = Issuer()
    async with issuer.http() as http:
        verifier = OidcVerifier(ISSUER, "api", "api", (), http)
        leaver = asyncio.create_task(verifier.verify(issuer.token()))
        stayer = asyncio.create_task(verifier.verify(issuer.token(jti="2")))
        await asyncio.sleep(0)
        leaver.cancel()
        assert (await stayer).id == "s"
        assert issuer.fetches == 1
