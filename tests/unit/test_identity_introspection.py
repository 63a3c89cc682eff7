"""Opaque tokens: what their issuer's answers mean, and how often it is asked."""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import parse_qs

import httpx
import pytest
from pydantic import SecretStr

from serve_app.errors import AuthenticationFailed, IdentityUnavailable
from serve_app.identity.claims import TrustedIssuer
from serve_app.identity.introspection import IntrospectionPolicy
from serve_app.identity.oidc import OidcVerifier
from serve_app.records import PrincipalKind

ISSUER = "https://issuer.test/a"
SECRET = "s3cret/with:signs"
TOKEN = "opaque-token-of-ada"
TRUSTED = TrustedIssuer(
    url=ISSUER,
    audience="api",
    client_id="our client",
    authorized_parties=("web",),
    introspection_secret=SecretStr(SECRET),
)


def active(**changes: Any) -> dict[str, Any]:
    answer = {
        "active": True,
        "sub": "ada",
        "aud": ["api"],
        "client_id": "web",
        "token_type": "Bearer",
        "scope": "openid comp-ai:user",
        "iat": time.time(),
        "exp": time.time() + 3600,
    } | changes
    return {name: value for name, value in answer.items() if value is not None}


class Issuer:
    """An issuer at the transport's seam: `answers` by token, None for one that is away."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {TOKEN: active()}
        self.asked: list[str] = []
        self.away = False
        self.status = 200
        self.reached = asyncio.Event()
        self.hold: asyncio.Event | None = None

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        if self.away:
            raise httpx.ConnectError("away")
        if request.url.path.endswith("/.well-known/openid-configuration"):
            return httpx.Response(
                200, json={"issuer": ISSUER, "introspection_endpoint": f"{ISSUER}/introspect"}
            )
        form = parse_qs(request.content.decode())
        scheme, _, encoded = request.headers["authorization"].partition(" ")
        assert (scheme, base64.b64decode(encoded).decode()) == (
            "Basic",
            "our+client:s3cret%2Fwith%3Asigns",
        )
        (token,) = form["token"]
        self.asked.append(token)
        self.reached.set()
        if self.hold is not None:
            await self.hold.wait()
        return httpx.Response(self.status, json=self.answers.get(token, {"active": False}))


class Clock:
    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def issuer() -> Issuer:
    return Issuer()


@pytest.fixture
def clock() -> Clock:
    return Clock()


Make = Callable[..., OidcVerifier]


@pytest.fixture
async def make(issuer: Issuer, clock: Clock) -> AsyncIterator[Make]:
    async with httpx.AsyncClient(transport=httpx.MockTransport(issuer)) as http:
        made: list[OidcVerifier] = []

        def build(**policy: Any) -> OidcVerifier:
            policies = IntrospectionPolicy(**policy)
            made.append(OidcVerifier(TRUSTED, http, introspection_policy=policies, clock=clock))
            return made[-1]

        yield build
        for verifier in made:
            await verifier.close()


async def test_the_answer_names_the_principal(make: Make) -> None:
    principal = await make().verify(TOKEN)
    assert (principal.id, principal.client_id, set(principal.roles)) == (
        "ada",
        "web",
        {"comp-ai:user"},
    )


async def test_token_without_a_subject_is_the_clients_own(make: Make, issuer: Issuer) -> None:
    issuer.answers[TOKEN] = active(sub=None)
    principal = await make().verify(TOKEN)
    assert (principal.id, principal.kind) == ("web", PrincipalKind.SERVICE)


@pytest.mark.parametrize(
    "answer",
    [
        {"active": False},
        {},
        active(active="true"),
        active(active=1),
        active(aud="other"),
        active(aud=None),
        active(iss="https://evil.test"),
        active(client_id="other"),
        active(client_id=None),
        active(azp="other"),
        active(exp=time.time() - 31),
        active(exp=None),
        active(nbf=time.time() + 600),
        active(sub=""),
        active(token_type=None),
        active(token_type="refresh_token"),
        active(token_type="DPoP"),
        active(typ="Refresh"),
        active(typ="ID"),
        active(cnf={"jkt": "x"}),
    ],
)
async def test_refused_answers(answer: dict[str, Any], make: Make, issuer: Issuer) -> None:
    verifier = make()
    await verifier.verify(TOKEN)
    issuer.answers["other"] = answer
    with pytest.raises(AuthenticationFailed):
        await verifier.verify("other")


async def test_good_answer_is_kept_for_a_minute(make: Make, issuer: Issuer, clock: Clock) -> None:
    verifier = make()
    await verifier.verify(TOKEN)
    clock.time += 59
    await verifier.verify(TOKEN)
    assert issuer.asked == [TOKEN]
    # The issuer has ended it meanwhile: that is seen at the next question.
    issuer.answers.clear()
    clock.time += 1
    with pytest.raises(AuthenticationFailed, match="not active"):
        await verifier.verify(TOKEN)
    assert len(issuer.asked) == 2
    # And it does not come back with an outage.
    issuer.away = True
    clock.time += 31
    with pytest.raises(IdentityUnavailable):
        await verifier.verify(TOKEN)


async def test_good_answer_is_kept_no_longer_than_exp(issuer: Issuer) -> None:
    now = Clock()
    issuer.answers[TOKEN] = active(iat=now(), exp=now() + 20)
    async with httpx.AsyncClient(transport=httpx.MockTransport(issuer)) as http:
        verifier = OidcVerifier(TRUSTED, http, now=now)
        await verifier.verify(TOKEN)
        now.time += 51  # 20, and the clock skew
        with pytest.raises(AuthenticationFailed, match="expired"):
            await verifier.verify(TOKEN)
        await verifier.close()


async def test_refusal_is_kept_shortly(make: Make, issuer: Issuer, clock: Clock) -> None:
    verifier = make()
    for _ in range(5):
        with pytest.raises(AuthenticationFailed):
            await verifier.verify("made-up")
    assert issuer.asked == ["made-up"]
    issuer.answers["made-up"] = active()
    clock.time += 30
    assert (await verifier.verify("made-up")).id == "ada"


async def test_those_who_wait_share_one_question(make: Make, issuer: Issuer) -> None:
    verifier = make()
    issuer.hold = asyncio.Event()
    asking = [asyncio.create_task(verifier.verify(TOKEN)) for _ in range(20)]
    await issuer.reached.wait()
    # Whoever asked first may leave.
    asking[0].cancel()
    issuer.hold.set()
    assert {(await task).id for task in asking[1:]} == {"ada"}
    assert issuer.asked == [TOKEN]


async def test_made_up_tokens_cannot_flood_the_issuer(
    make: Make, issuer: Issuer, clock: Clock
) -> None:
    verifier = make(calls_per_s=5, burst=10, max_calls=100)
    await verifier.verify(TOKEN)
    clock.time += 60
    flood = [f"made-up-{number}" for number in range(500)]
    answers = await asyncio.gather(*map(verifier.verify, flood), return_exceptions=True)
    refused = [answer for answer in answers if isinstance(answer, AuthenticationFailed)]
    put_off = [answer for answer in answers if isinstance(answer, IdentityUnavailable)]
    assert (len(refused), len(put_off)) == (10, 490)
    assert all(answer.retry_after_s for answer in put_off)
    assert len(issuer.asked) == 1 + 10
    # A token that was good before does not stand in that line.
    assert (await verifier.verify(TOKEN)).id == "ada"
    clock.time += 1
    more = [f"more-{number}" for number in range(100)]
    await asyncio.gather(*map(verifier.verify, more), return_exceptions=True)
    assert len(issuer.asked) == 1 + 10 + 1 + 5


async def test_token_that_the_issuer_cannot_read_makes_nobody_wait(
    make: Make, issuer: Issuer
) -> None:
    verifier = make()
    issuer.status = 400
    with pytest.raises(AuthenticationFailed):
        await verifier.verify("unreadable")
    issuer.status = 200
    assert (await verifier.verify(TOKEN)).id == "ada"


async def test_slow_issuer_and_made_up_tokens_keep_no_good_one_waiting(
    make: Make, issuer: Issuer, clock: Clock
) -> None:
    verifier = make(max_calls=2)
    await verifier.verify(TOKEN)
    # So long ago that it would not do for an outage.
    clock.time += 3600
    issuer.hold = asyncio.Event()
    flood = [asyncio.create_task(verifier.verify(f"made-up-{number}")) for number in range(5)]
    done, waiting = await asyncio.wait(flood, return_when=asyncio.FIRST_COMPLETED)
    assert (len(done), len(waiting)) == (3, 2)
    asking = asyncio.create_task(verifier.verify(TOKEN))
    await asyncio.sleep(0)
    issuer.hold.set()
    assert (await asking).id == "ada"
    await asyncio.gather(*flood, return_exceptions=True)


async def test_what_is_no_token_is_not_asked_for(make: Make, issuer: Issuer) -> None:
    verifier = make()
    for credential in ("ü", "a&b", "a=b", "", "a\x00", "x" * 20_000):
        with pytest.raises(AuthenticationFailed):
            await verifier.verify(credential)
    assert issuer.asked == []


@pytest.mark.parametrize("failure", ["away", "refuses our client", "is no issuer"])
async def test_outage_is_survived_for_a_while(
    failure: str, make: Make, issuer: Issuer, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    verifier = make()
    await verifier.verify(TOKEN)
    match failure:
        case "away":
            issuer.away = True
        case "refuses our client":
            issuer.status = 401
        case _:
            issuer.answers[TOKEN] = ["not an object"]
    clock.time += 299
    assert (await verifier.verify(TOKEN)).id == "ada"
    with pytest.raises(IdentityUnavailable):
        await verifier.verify("another-token")
    clock.time += 1
    with pytest.raises(IdentityUnavailable) as refusal:
        await verifier.verify(TOKEN)
    assert refusal.value.retry_after_s
    assert "oidc_introspection_failed" in {getattr(r, "action", "") for r in caplog.records}
    assert TOKEN not in caplog.text
    assert SECRET not in caplog.text


async def test_failed_issuer_is_left_alone_for_a_second(
    make: Make, issuer: Issuer, clock: Clock
) -> None:
    verifier = make()
    issuer.status = 500
    for number in range(10):
        with pytest.raises(IdentityUnavailable):
            await verifier.verify(f"token-{number}")
    assert len(issuer.asked) == 1
    issuer.status = 200
    clock.time += 1
    assert (await verifier.verify(TOKEN)).id == "ada"
