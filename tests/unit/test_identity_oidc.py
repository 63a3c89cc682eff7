"""What verified claims mean, and which published keys are used."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from serve_app.errors import AuthenticationFailed, IdentityUnavailable
from serve_app.identity.claims import TrustedIssuer, to_principal
from serve_app.identity.jwks import KeyPolicy, parse_jwks
from serve_app.identity.oidc import OidcVerifier, TokenVerifier
from serve_app.identity.principal import Permission, Principal
from serve_app.identity.signing_key import SigningKey
from serve_app.records import PrincipalKind

ISSUER = "https://issuer.test/realms/a"
TRUSTED = TrustedIssuer(url=ISSUER, audience="api", client_id="us")


def principal_of(claims: dict[str, Any], **issuer: Any) -> Principal:
    return to_principal({"sub": "s"} | claims, replace(TRUSTED, **issuer))


@pytest.mark.parametrize(
    ("claims", "roles"),
    [
        ({}, set()),
        ({"realm_access": {"roles": ["comp-ai:user", "other"]}}, {"comp-ai:user", "other"}),
        ({"resource_access": {"us": {"roles": ["comp-ai:admin"]}}}, {"comp-ai:admin"}),
        ({"resource_access": {"them": {"roles": ["comp-ai:admin"]}}}, set()),
        ({"roles": ["comp-ai:auditor", "admin"]}, {"comp-ai:auditor"}),
        ({"roles": ["comp-ai:model:org/large"]}, {"comp-ai:model:org/large"}),
        ({"scope": "openid comp-ai:user email"}, {"comp-ai:user"}),
        ({"scope": ["comp-ai:user"]}, set()),
        ({"realm_access": {"roles": {"comp-ai:admin": True}}}, set()),
        ({"realm_access": "comp-ai:admin", "resource_access": [], "roles": 5}, set()),
        ({"realm_access": {"roles": ["COMP-AI:ADMIN", None]}}, {"COMP-AI:ADMIN"}),
    ],
)
def test_roles_are_read_where_they_stand(claims: dict[str, Any], roles: set[str]) -> None:
    principal = principal_of(claims)
    assert principal.roles == roles
    # What they give is for the policy to say: tests/unit/test_access.py.
    assert (principal.permissions, principal.models) == (frozenset(), None)


def test_groups_and_client_are_kept() -> None:
    principal = principal_of({"groups": ["/platform/team-a", "ops", 5], "azp": "web"})
    assert principal.groups == {"platform/team-a", "ops"}
    assert principal.client_id == "web"
    assert principal_of({"groups": {"a": 1}, "azp": ["web"]}).client_id is None


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
    assert principal_of(claims).kind is kind


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

    def __init__(self, url: str = ISSUER) -> None:
        self.url = url
        self.key = SigningKey.generate()
        self.keys: Any = [self.key.to_jwk()]
        self.fetches = 0

    def http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.MockTransport(self._answer))

    def token(self, **changes: Any) -> str:
        claims = {"iss": self.url, "aud": "api", "sub": "s", "exp": time.time() + 300}
        claims |= changes
        return self.key.sign({name: value for name, value in claims.items() if value is not None})

    def _answer(self, request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/.well-known/openid-configuration"):
            return httpx.Response(200, json={"issuer": self.url, "jwks_uri": f"{self.url}/certs"})
        self.fetches += 1
        return httpx.Response(200, json={"keys": self.keys})


async def test_cached_token_is_looked_at_again_after_a_minute() -> None:
    issuer, seconds = Issuer(), 0.0
    async with issuer.http() as http:
        verifier = OidcVerifier(TRUSTED, http, clock=lambda: seconds)
        token = issuer.token()
        first = await verifier.verify(token)
        assert await verifier.verify(token) is first
        seconds = 60.0
        assert await verifier.verify(token) is not first


async def test_token_of_a_removed_key_is_refused() -> None:
    issuer, seconds = Issuer(), 0.0
    async with issuer.http() as http:
        verifier = OidcVerifier(TRUSTED, http, clock=lambda: seconds)
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
        verifier = OidcVerifier(TRUSTED, http, clock=lambda: seconds)
        await verifier.verify(issuer.token())
        issuer.keys, seconds = [], 61.0
        with pytest.raises(IdentityUnavailable):
            await verifier.verify(SigningKey.generate().sign({"sub": "x"}))
        await verifier.verify(issuer.token(jti="new"))


async def test_cache_is_bounded() -> None:
    issuer = Issuer()
    async with issuer.http() as http:
        verifier = OidcVerifier(TRUSTED, http, cache_size=2)
        tokens = [issuer.token(jti=str(number)) for number in range(3)]
        principals = [await verifier.verify(token) for token in tokens]
        assert await verifier.verify(tokens[2]) is principals[2]
        assert await verifier.verify(tokens[0]) is not principals[0]


async def test_new_key_is_found_though_made_up_ones_were_just_looked_for() -> None:
    issuer = Issuer()
    async with issuer.http() as http:
        policy = KeyPolicy(unknown_key_s=0.1)
        verifier = OidcVerifier(TRUSTED, http, key_policy=policy)
        await verifier.verify(issuer.token())
        with pytest.raises(AuthenticationFailed):
            await verifier.verify(SigningKey.generate().sign({"sub": "x"}))
        issuer.key = SigningKey.generate()
        issuer.keys.append(issuer.key.to_jwk())
        fetches = issuer.fetches
        tokens = [issuer.token(jti=str(number)) for number in range(300)]
        principals = await asyncio.gather(*map(verifier.verify, tokens))
        assert {principal.id for principal in principals} == {"s"}
        assert issuer.fetches == fetches + 1
        await verifier.close()


async def test_made_up_keys_do_not_pile_up() -> None:
    issuer = Issuer()
    async with issuer.http() as http:
        verifier = OidcVerifier(TRUSTED, http, key_policy=KeyPolicy(unknown_key_s=3600))
        await verifier.verify(issuer.token())
        made_up = [SigningKey.generate().sign({"sub": "x"}) for _ in range(102)]
        asking = [asyncio.create_task(verifier.verify(token)) for token in made_up]
        done, waiting = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
        assert len(waiting) == 100
        for task in done:
            assert isinstance(task.exception(), IdentityUnavailable)
        for task in asking:
            task.cancel()
        await verifier.close()


async def test_key_that_was_looked_for_in_vain_does_not_wait_again() -> None:
    issuer = Issuer()
    async with issuer.http() as http:
        verifier = OidcVerifier(TRUSTED, http, key_policy=KeyPolicy(unknown_key_s=3600))
        made_up = SigningKey.generate().sign({"sub": "x"})
        for _ in range(3):
            with pytest.raises(AuthenticationFailed, match="does not publish"):
                await verifier.verify(made_up)
        assert issuer.fetches == 1


async def test_cached_key_does_not_wait_for_made_up_ones() -> None:
    issuer = Issuer()
    async with issuer.http() as http:
        verifier = OidcVerifier(TRUSTED, http, key_policy=KeyPolicy(unknown_key_s=3600))
        await verifier.verify(issuer.token())
        waiter = asyncio.create_task(verifier.verify(SigningKey.generate().sign({"sub": "x"})))
        await asyncio.sleep(0)
        assert (await verifier.verify(issuer.token(jti="2"))).id == "s"
        assert not waiter.done()
        waiter.cancel()
        await verifier.close()


def test_what_a_further_issuer_names_is_its_own() -> None:
    claims = {
        "azp": "web",
        "groups": ["/admins"],
        "realm_access": {"roles": ["comp-ai:user", "comp-ai:admin", "comp-ai:model:a", "boss"]},
    }
    principal = principal_of(claims, name="partner", permissions=frozenset({Permission.USER}))
    assert (principal.id, principal.client_id) == ("partner:s", "partner:web")
    assert principal.groups == {"partner:admins"}
    assert principal.roles == {
        "comp-ai:user",
        "comp-ai:model:a",
        "partner:comp-ai:admin",
        "partner:boss",
    }


def test_name_and_subject_fit_the_database_together() -> None:
    assert len(principal_of({"sub": "s" * 255}).id) == 255
    assert len(principal_of({"sub": "s" * 253}, name="p").id) == 255
    with pytest.raises(AuthenticationFailed):
        principal_of({"sub": "s" * 254}, name="p")


async def test_issuer_is_chosen_by_the_claim_and_checked_by_its_own_keys() -> None:
    first, partner = Issuer(), Issuer("https://partner.test")
    async with first.http() as http, partner.http() as partner_http:
        trusted = TrustedIssuer(url=partner.url, audience="api", client_id="us", name="partner")
        policy = KeyPolicy(unknown_key_s=0.01)
        verifier = OidcVerifier(TRUSTED, http, key_policy=policy)
        tokens = TokenVerifier([verifier, OidcVerifier(trusted, partner_http)])
        assert (await tokens.verify(first.token())).id == "s"
        assert (await tokens.verify(partner.token())).id == "partner:s"
        # A key of one issuer is none of the other's.
        forged = partner.key.sign({"iss": ISSUER, "aud": "api", "sub": "s", "exp": 2**40})
        for token in (forged, first.token(iss="https://third.test"), first.token(iss=None)):
            with pytest.raises(AuthenticationFailed):
                await tokens.verify(token)
        # Nor may a subject of the first issuer stand for one of the other.
        with pytest.raises(AuthenticationFailed, match="sub"):
            await tokens.verify(first.token(sub="partner:s"))
        await tokens.close()


async def test_token_of_a_stranger_makes_nobody_fetch() -> None:
    issuer = Issuer()
    async with issuer.http() as http:
        tokens = TokenVerifier([OidcVerifier(TRUSTED, http)])
        with pytest.raises(AuthenticationFailed, match="another issuer"):
            await tokens.verify(issuer.token(iss="https://third.test"))
        assert issuer.fetches == 0


async def test_client_that_leaves_does_not_stop_the_fetch() -> None:
    issuer = Issuer()
    async with issuer.http() as http:
        verifier = OidcVerifier(TRUSTED, http)
        leaver = asyncio.create_task(verifier.verify(issuer.token()))
        stayer = asyncio.create_task(verifier.verify(issuer.token(jti="2")))
        await asyncio.sleep(0)
        leaver.cancel()
        assert (await stayer).id == "s"
        assert issuer.fetches == 1
