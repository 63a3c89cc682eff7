"""Tokens of a real, certified OpenID Connect provider, through the gateway's HTTP face."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest

from tests.integration.fakes import World, signed_in_by, until
from tests.integration.oidc_provider import (
    BROWSER,
    ELSEWHERE,
    OPAQUE,
    SERVICE,
    STRANGER,
    Browser,
    Provider,
    running_provider,
)

# Nobody listens there: no API key is known, and none is asked for.
NO_DATABASE = {"POSTGRES_HOST": "127.0.0.1", "POSTGRES_PORT": "9"}


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    """A provider that no test stops; some rotate its keys."""
    with running_provider() as running:
        yield running


@pytest.fixture
async def browser(provider: Provider) -> AsyncIterator[Browser]:
    async with httpx.AsyncClient(timeout=30) as http:
        yield Browser(http, provider)


def settings_for(provider: Provider) -> dict[str, str]:
    return NO_DATABASE | {
        "COMP_AI_OIDC_ISSUER": provider.url,
        "COMP_AI_OIDC_AUTHORIZED_PARTIES": f"{SERVICE[0]},{BROWSER[0]}",
        "COMP_AI_OIDC_UNKNOWN_KEY_S": "1",
        "COMP_AI_OIDC_INTROSPECTION": "true",
        "COMP_AI_OIDC_INTROSPECTION_CACHE_S": "0.5",
        "COMP_AI_KEYCLOAK_CLIENT_SECRET": SERVICE[1],
    }


@pytest.fixture
async def gateway(provider: Provider) -> AsyncIterator[World]:
    async with signed_in_by(settings_for(provider)) as made:
        yield made


async def ask(gateway: World, token: str) -> httpx.Response:
    async with httpx.AsyncClient(base_url=gateway.url, timeout=20) as http:
        return await http.get("/v1/models", headers={"Authorization": f"Bearer {token}"})


async def refusal(gateway: World, token: str) -> str:
    """Return the message with which `token` is refused."""
    answer = await ask(gateway, token)
    assert answer.status_code == 401
    assert token not in answer.text + gateway.lines.getvalue()
    return str(answer.json()["error"]["message"])


def principals(gateway: World) -> list[Any]:
    return [(record.principal_id, record.principal_kind) for record in gateway.records]


async def test_client_credentials(gateway: World, browser: Browser) -> None:
    assert (await ask(gateway, await browser.service_token())).status_code == 200
    assert principals(gateway) == [(SERVICE[0], "service")]


async def test_code_flow_with_pkce(gateway: World, browser: Browser) -> None:
    tokens = await browser.sign_in()
    assert (await ask(gateway, tokens["access_token"])).status_code == 200
    assert principals(gateway) == [("ada", "user")]
    # The other two are tokens of the same issuer, signed with the same key.
    assert "typ" in await refusal(gateway, tokens["id_token"])
    assert "not an access token" in await refusal(gateway, tokens["refresh_token"])


async def test_code_is_worth_nothing_without_its_verifier(browser: Browser) -> None:
    code = await browser.authorize("v" * 43)
    answer = await browser.redeem(code, "w" * 43)
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_grant")
    assert await browser.authorize(None) == "invalid_request"


async def test_refresh_and_its_rotation(gateway: World, browser: Browser) -> None:
    first = await browser.sign_in()
    second = (await browser.refresh(first["refresh_token"])).json()
    assert second["access_token"] != first["access_token"]
    assert (await ask(gateway, second["access_token"])).status_code == 200
    again = await browser.refresh(first["refresh_token"])
    assert (again.status_code, again.json()["error"]) == (400, "invalid_grant")


async def test_rotation_of_keys_under_load(gateway: World, browser: Browser) -> None:
    seen: dict[str, int] = {}
    ended = asyncio.Event()

    async def work() -> None:
        while not ended.is_set():
            token = await browser.service_token()
            kid = jwt.get_unverified_header(token)["kid"]
            answer = await ask(gateway, token)
            assert answer.status_code == 200, answer.text
            seen[kid] = seen.get(kid, 0) + 1

    async with asyncio.TaskGroup() as group:
        for _ in range(8):
            group.create_task(work())
        for _ in range(4):
            kid = await browser.rotate()
            await until(lambda kid=kid: seen.get(kid, 0) >= 8)  # type: ignore[misc]
        ended.set()
    assert len(seen) >= 4


async def test_opaque_token_until_it_is_revoked(gateway: World, browser: Browser) -> None:
    token = await browser.service_token(resource=OPAQUE)
    assert "." not in token
    assert (await ask(gateway, token)).status_code == 200
    assert principals(gateway) == [(SERVICE[0], "service")]
    await browser.revoke(token, SERVICE)
    await refused_soon(gateway, token)


async def test_opaque_token_until_its_user_signs_out(gateway: World, browser: Browser) -> None:
    tokens = await browser.sign_in(OPAQUE)
    assert (await ask(gateway, tokens["access_token"])).status_code == 200
    assert principals(gateway) == [("ada", "user")]
    await browser.sign_out(tokens["id_token"])
    await refused_soon(gateway, tokens["access_token"])
    assert (await browser.refresh(tokens["refresh_token"])).status_code == 400


async def refused_soon(gateway: World, token: str) -> None:
    """Return once `token` is refused: when what is known of it has become too old."""
    async with asyncio.timeout(20):
        while (await ask(gateway, token)).status_code == 200:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert "not active" in await refusal(gateway, token)


@pytest.mark.parametrize("resource", [OPAQUE, "urn:comp-ai:signed"])
async def test_token_of_another_client(resource: str, gateway: World, browser: Browser) -> None:
    assert "azp" in await refusal(gateway, await browser.service_token(STRANGER, resource))


async def test_token_for_another_service(gateway: World, browser: Browser) -> None:
    assert "aud" in await refusal(gateway, await browser.service_token(resource=ELSEWHERE))


async def test_known_keys_go_on_without_the_issuer(browser: Browser) -> None:
    with running_provider() as stopping:
        async with signed_in_by(settings_for(stopping)) as gateway:
            other = Browser(browser.http, stopping)
            first, second = [await other.service_token() for _ in range(2)]
            opaque, unseen = [await other.service_token(resource=OPAQUE) for _ in range(2)]
            for token in (first, opaque):
                assert (await ask(gateway, token)).status_code == 200
            stopping.stop()
            for token in (first, second, opaque):
                assert (await ask(gateway, token)).status_code == 200
            # Nobody can say what this one is.
            answer = await ask(gateway, unseen)
            assert (answer.status_code, answer.json()["error"]["code"]) == (
                503,
                "identity_unavailable",
            )
            assert answer.headers["retry-after"]


def test_every_package_is_pinned_by_its_content() -> None:
    lock = json.loads(
        (Path(__file__).parents[1] / "oidc_provider" / "package-lock.json").read_text("utf-8")
    )
    packages = {name: package for name, package in lock["packages"].items() if name}
    assert packages
    assert all(package["integrity"].startswith("sha512-") for package in packages.values())
    # Where they come from is the choice of whoever installs them.
    assert not [name for name, package in packages.items() if "resolved" in package]
