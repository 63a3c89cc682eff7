"""The table of attacks: each is refused, and neither the answer nor a log gives anything away.

Tokens here. What goes through nginx is in test_attacks_door.py.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives import serialization

from serve_app.identity.oidc import MAX_TOKEN_CHARS
from tests.integration.fakes import World, signed_in_by
from tests.integration.forge import (
    ATTACKER_KEY,
    AUDIENCE,
    EC_KEY,
    PARTY,
    RSA_KEY,
    Issuer,
    good_claims,
    public_jwk,
    raw_claims,
    running_issuer,
    segment,
    sign,
    sign_hmac,
    unsigned,
    with_raw_payload,
)

NOW = time.time
PUBLIC_PEM = RSA_KEY.public_key().public_bytes(
    serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
)
PUBLIC_DER = RSA_KEY.public_key().public_bytes(
    serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
)
PUBLIC_JWK = json.dumps(public_jwk(RSA_KEY, "rsa")).encode()


def parts(token: str) -> list[str]:
    return token.split(".")


# What is forged, and how. Each is refused with 401.
FORGED: dict[str, Callable[[Issuer], str]] = {
    # The algorithm (RFC 8725 §3.1, §3.2).
    "alg none": lambda i: unsigned(i, "none"),
    "alg None": lambda i: unsigned(i, "None"),
    "alg nOnE": lambda i: unsigned(i, "nOnE"),
    "alg none, a signature left in": lambda i: unsigned(i, "none") + parts(sign(good_claims(i)))[2],
    "alg empty": lambda i: unsigned(i, ""),
    "alg missing": lambda i: f"{segment({'kid': 'rsa', 'typ': 'JWT'})}.{segment({})}.AA",
    "alg as list": lambda i: f"{segment({'alg': ['RS256'], 'kid': 'rsa', 'typ': 'JWT'})}.e30.AA",
    "HS256 with the public key": lambda i: sign_hmac(good_claims(i), PUBLIC_PEM),
    "HS256 with the public key, no line end": lambda i: sign_hmac(
        good_claims(i), PUBLIC_PEM.strip()
    ),
    "HS256 with the public key in DER": lambda i: sign_hmac(good_claims(i), PUBLIC_DER),
    "HS256 with the published JWK": lambda i: sign_hmac(good_claims(i), PUBLIC_JWK),
    "HS256 with no key": lambda i: sign_hmac(good_claims(i), b""),
    "algorithm of another key type": lambda i: sign(good_claims(i), EC_KEY, "ES256", kid="rsa"),
    "ES256 signature of zeros": lambda i: ".".join(
        [*parts(sign(good_claims(i), EC_KEY, "ES256"))[:2], segment(b"\0" * 64)]
    ),
    # The key.
    "another key under a known kid": lambda i: sign(good_claims(i), ATTACKER_KEY),
    "key that is not published": lambda i: sign(good_claims(i), ATTACKER_KEY, kid="new"),
    "kid as path": lambda i: sign(good_claims(i), ATTACKER_KEY, kid="../../../dev/null"),
    "kid as address": lambda i: sign(good_claims(i), ATTACKER_KEY, kid=f"{i.url}/evil"),
    "kid as SQL": lambda i: sign(good_claims(i), ATTACKER_KEY, kid="' UNION SELECT 'x' --"),
    "kid with NUL": lambda i: sign(good_claims(i), ATTACKER_KEY, kid="rsa\0"),
    "kid empty": lambda i: sign(good_claims(i), kid=""),
    "kid huge": lambda i: sign(good_claims(i), kid="k" * 1000),
    "kid as list": lambda i: f"{segment({'alg': 'RS256', 'typ': 'JWT', 'kid': ['rsa']})}.e30.AA",
    "no kid": lambda i: f"{segment({'alg': 'RS256', 'typ': 'JWT'})}.{segment({})}.AA",
    "jku": lambda i: sign(good_claims(i), ATTACKER_KEY, kid="x", jku=f"{i.url}/evil"),
    "x5u": lambda i: sign(good_claims(i), ATTACKER_KEY, kid="x", x5u=f"{i.url}/evil"),
    "jwk": lambda i: sign(good_claims(i), ATTACKER_KEY, jwk=public_jwk(ATTACKER_KEY, "rsa")),
    # Our own key stands at the address, or in the header: who looked there would be content.
    "jku beside a good signature": lambda i: sign(good_claims(i), jku=f"{i.url}/jwks"),
    "x5u beside a good signature": lambda i: sign(good_claims(i), x5u=f"{i.url}/evil"),
    "jwk beside a good signature": lambda i: sign(good_claims(i), jwk=public_jwk(RSA_KEY, "rsa")),
    "x5c": lambda i: sign(good_claims(i), x5c=["MIIB"]),
    # The form.
    "crit": lambda i: sign(good_claims(i), crit=["exp"]),
    "nested token": lambda i: with_raw_payload(sign(good_claims(i)).encode(), cty="JWT"),
    "nested token that does not say so": lambda i: with_raw_payload(sign(good_claims(i)).encode()),
    "compressed": lambda i: sign(good_claims(i), zip="DEF"),
    "signature removed": lambda i: sign(good_claims(i)).rpartition(".")[0] + ".",
    "signature part removed": lambda i: sign(good_claims(i)).rpartition(".")[0],
    "truncated": lambda i: sign(good_claims(i))[:-20],
    "claims swapped": lambda i: ".".join(
        [
            parts(sign(good_claims(i)))[0],
            segment(good_claims(i, sub="admin")),
            parts(sign(good_claims(i)))[2],
        ]
    ),
    "encrypted": lambda i: f"{segment({'alg': 'RSA-OAEP', 'enc': 'A256GCM'})}.a.b.c.d",
    "garbage": lambda i: "garbage",
    "dots": lambda i: "..",
    "not ASCII": lambda i: "é.ü.\udcff",
    "huge": lambda i: sign(good_claims(i, filler="x" * MAX_TOKEN_CHARS)),
    "deep header": lambda i: f"{segment(b'[' * 9000)}.e30.e30",
    "deep payload": lambda i: with_raw_payload(b"[" * 9000),
    "payload is a list": lambda i: with_raw_payload(b"[]"),
    "claim named twice": lambda i: with_raw_payload(
        raw_claims(i, sub='"admin", "sub": "2f6c1f0e-user"')
    ),
    "role named twice": lambda i: with_raw_payload(
        raw_claims(i, realm_access='{"roles": [], "roles": ["comp-ai:admin"]}')
    ),
    # The issuer, for whom, by whom.
    "other issuer": lambda i: sign(good_claims(i, iss="http://evil.example/realms/test")),
    "issuer in another case": lambda i: sign(good_claims(i, iss=i.url.upper())),
    "issuer before an @": lambda i: sign(good_claims(i, iss=f"{i.url}@evil.example")),
    "issuer as list": lambda i: with_raw_payload(raw_claims(i, iss=json.dumps([i.url]))),
    "no issuer": lambda i: sign(good_claims(i, iss=None)),
    "other audience": lambda i: sign(good_claims(i, aud="account")),
    "audience in part": lambda i: sign(good_claims(i, aud=AUDIENCE + "-2")),
    "audience as object": lambda i: with_raw_payload(raw_claims(i, aud=f'{{"{AUDIENCE}": 1}}')),
    "no audience": lambda i: sign(good_claims(i, aud=None)),
    "token of another client": lambda i: sign(good_claims(i, azp="other")),
    "client as list": lambda i: sign(good_claims(i, azp=[PARTY])),
    "no client": lambda i: sign(good_claims(i, azp=None)),
    "missing sub": lambda i: sign(good_claims(i, sub=None)),
    "empty sub": lambda i: sign(good_claims(i, sub="")),
    "sub with NUL": lambda i: sign(good_claims(i, sub="a\x00b")),
    "sub with line break": lambda i: sign(good_claims(i, sub="a\nlevel=info")),
    "sub too long": lambda i: sign(good_claims(i, sub="s" * 256)),
    # The time.
    "expired": lambda i: sign(good_claims(i, exp=int(NOW()) - 31)),
    "no expiry": lambda i: sign(good_claims(i, exp=None)),
    "expiry as text": lambda i: sign(good_claims(i, exp="9999999999")),
    "expiry true": lambda i: with_raw_payload(raw_claims(i, exp="true")),
    "expiry NaN": lambda i: with_raw_payload(raw_claims(i, exp="NaN")),
    "expiry Infinity": lambda i: with_raw_payload(raw_claims(i, exp="Infinity")),
    "expiry beyond a float": lambda i: with_raw_payload(raw_claims(i, exp="1" + "0" * 400)),
    "not yet valid": lambda i: sign(good_claims(i, nbf=int(NOW()) + 600)),
    "issued in the future": lambda i: sign(good_claims(i, iat=int(NOW()) + 600)),
    # Another token of the same issuer, signed with the same key.
    "header typ": lambda i: sign(good_claims(i), typ="logout+jwt"),
    "ID token of Keycloak": lambda i: sign(good_claims(i, typ="ID")),
    "ID token of another issuer": lambda i: sign(good_claims(i, typ=None, at_hash="abc")),
    "refresh token": lambda i: sign(good_claims(i, typ="Refresh")),
    "logout token": lambda i: sign(good_claims(i, typ="Logout")),
    "token bound to a key": lambda i: sign(good_claims(i, cnf={"jkt": "abc"})),
}

# A good token in a header that is not as it should be: what is sent, for a good credential.
HEADERS: dict[str, Callable[[str], list[tuple[str, str]]]] = {
    "no header": lambda good: [],
    "empty header": lambda good: [("authorization", "")],
    "no scheme": lambda good: [("authorization", good)],
    "scheme alone": lambda good: [("authorization", "Bearer")],
    "another scheme": lambda good: [("authorization", f"Basic {good}")],
    "scheme twice": lambda good: [("authorization", f"Bearer Bearer {good}")],
    "scheme run together": lambda good: [("authorization", f"Bearer{good}")],
    "two credentials": lambda good: [("authorization", f"Bearer {good} {good}")],
    "two credentials with a comma": lambda good: [("authorization", f"Bearer {good}, Bearer x")],
    "tab for a space": lambda good: [("authorization", f"Bearer\t{good}")],
    "quotes": lambda good: [("authorization", f'Bearer "{good}"')],
    "header twice": lambda good: [("authorization", f"Bearer {good}")] * 2,
    "header twice, good first": lambda good: [
        ("authorization", f"Bearer {good}"),
        ("authorization", "Bearer x"),
    ],
    "header twice, good last": lambda good: [
        ("authorization", "Bearer x"),
        ("authorization", f"Bearer {good}"),
    ],
    "another header": lambda good: [("x-authorization", f"Bearer {good}")],
    "proxy's header": lambda good: [("proxy-authorization", f"Bearer {good}")],
    "cookie": lambda good: [("cookie", f"access_token={good}")],
}

# Good tokens of who may not do that: refused with 403.
POWERLESS: dict[str, dict[str, Any]] = {
    "no role": {"realm_access": None},
    "role of another client": {
        "realm_access": None,
        "resource_access": {"other": {"roles": ["comp-ai:user", "comp-ai:admin"]}},
    },
    "role that is longer": {"realm_access": {"roles": ["comp-ai:users", "comp-ai:administrator"]}},
    "role in another case": {"realm_access": {"roles": ["COMP-AI:USER"]}},
    "role as group": {"realm_access": None, "groups": ["comp-ai:admin", "/comp-ai:user"]},
    "role as key": {"realm_access": {"roles": {"comp-ai:admin": True}}},
    "permissions of one's own": {"realm_access": None, "permissions": ["comp-ai:admin"]},
}


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    """An issuer that no test stops or changes."""
    with running_issuer() as running:
        yield running


@pytest.fixture
async def gateway(issuer: Issuer) -> AsyncIterator[World]:
    settings = {
        "POSTGRES_HOST": "127.0.0.1",
        "POSTGRES_PORT": "9",
        "COMP_AI_OIDC_ISSUER": issuer.url,
        "COMP_AI_OIDC_AUTHORIZED_PARTIES": PARTY,
    }
    async with signed_in_by(settings) as made:
        yield made


async def ask(
    gateway: World, headers: list[tuple[str, str]], path: str = "/v1/models"
) -> httpx.Response:
    raw = [(name.encode(), value.encode("utf-8", "surrogateescape")) for name, value in headers]
    async with httpx.AsyncClient(base_url=gateway.url, timeout=20) as http:
        return await http.get(path, headers=raw)


def assert_refused(answer: httpx.Response, status: int, code: str) -> None:
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["code"] == code


def assert_nothing_shows(token: str, *places: str) -> None:
    """Check that no part of `token` that says anything stands in `places`."""
    for part in token.split("."):
        assert len(part) < 12 or not [place for place in places if part in place]


@pytest.mark.parametrize("forged", FORGED)
async def test_forged_token(
    forged: str, issuer: Issuer, gateway: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "serve_app")
    token = FORGED[forged](issuer)
    good = await ask(gateway, [("authorization", f"Bearer {sign(good_claims(issuer))}")])
    assert good.status_code == 200
    answer = await ask(gateway, [("authorization", f"Bearer {token}")])
    assert_refused(answer, 401, "invalid_api_key")
    assert_nothing_shows(token, answer.text, str(answer.headers), gateway.lines.getvalue())
    assert_nothing_shows(token, caplog.text)
    assert [record.principal_id for record in gateway.records] == ["2f6c1f0e-user", None]
    assert issuer.strange == []


@pytest.mark.parametrize("header", HEADERS)
async def test_header_that_is_not_as_it_should_be(
    header: str, issuer: Issuer, gateway: World
) -> None:
    token = sign(good_claims(issuer))
    answer = await ask(gateway, HEADERS[header](token))
    assert_refused(answer, 401, "invalid_api_key")
    assert_nothing_shows(token, answer.text, str(answer.headers), gateway.lines.getvalue())
    assert [record.principal_id for record in gateway.records] == [None]


@pytest.mark.parametrize("name", ["access_token", "token", "api_key", "key"])
async def test_token_in_the_address(name: str, issuer: Issuer, gateway: World) -> None:
    token = sign(good_claims(issuer))
    answer = await ask(gateway, [], f"/v1/models?{name}={token}")
    assert_refused(answer, 401, "invalid_api_key")
    assert_nothing_shows(token, answer.text, gateway.lines.getvalue())


@pytest.mark.parametrize("claims", POWERLESS)
async def test_token_of_somebody_who_may_not(claims: str, issuer: Issuer, gateway: World) -> None:
    token = sign(good_claims(issuer, **POWERLESS[claims]))
    answer = await ask(gateway, [("authorization", f"Bearer {token}")])
    assert_refused(answer, 403, "permission_denied")
    assert_nothing_shows(token, answer.text, gateway.lines.getvalue())


async def test_token_that_was_good_expires_also_in_the_cache(
    issuer: Issuer, gateway: World
) -> None:
    token = sign(good_claims(issuer, exp=int(NOW()) - 28))
    header = [("authorization", f"Bearer {token}")]
    assert (await ask(gateway, header)).status_code == 200
    async with httpx.AsyncClient(base_url=gateway.url, timeout=20) as http:
        while (await http.get("/v1/models", headers=header)).status_code == 200:
            pass
    assert_refused(await ask(gateway, header), 401, "invalid_api_key")


def test_the_forger_makes_good_tokens_too(issuer: Issuer) -> None:
    """Else everything above would be refused for the wrong reason."""
    token = sign_hmac(good_claims(issuer), b"k" * 32)
    assert jwt.decode(token, b"k" * 32, algorithms=["HS256"], audience=AUDIENCE)["azp"] == PARTY
