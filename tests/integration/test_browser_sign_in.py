"""A whole sign-in: real nginx, real oauth2-proxy with our configuration, a certified provider.

No package index carries oauth2-proxy, so its binary must be brought; TEST_OAUTH2_PROXY names it.
What nginx does with its answers is in test_browser_door.py, without it.
"""

from __future__ import annotations

import base64
import os
import secrets
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx
import pytest

from serve_app.stack.nginx import TEMPLATE
from serve_app.stack.ports import pick_free
from tests.integration import oidc_provider
from tests.integration.browser_stand_ins import PREFIX
from tests.integration.oidc_provider import CALLBACK, Provider, running_provider
from tests.integration.test_browser_door import BROWSER, Door, open_door

BINARY = os.environ.get("TEST_OAUTH2_PROXY", "")
CONFIG = TEMPLATE.parents[1] / "oauth2-proxy" / "oauth2-proxy.cfg"
SESSION = "comp_ai_session"
_MAX_REDIRECTS = 20

pytestmark = pytest.mark.skipif(
    not BINARY, reason="needs oauth2-proxy 7.15: set TEST_OAUTH2_PROXY to its binary (README.md)"
)


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    with running_provider() as running:
        yield running


def variables(provider: Provider, port: int) -> dict[str, str]:
    """What differs from our configuration: plain HTTP, and an issuer that is no Keycloak.

    The provider signs in `ada` and knows no groups, so her name stands for one.
    """
    client_id, client_secret = oidc_provider.BROWSER
    ours = {
        "HTTP_ADDRESS": f"127.0.0.1:{port}",
        "OIDC_ISSUER_URL": provider.url,
        "REDIRECT_URL": CALLBACK,
        "CLIENT_ID": client_id,
        "CLIENT_SECRET": client_secret,
        "COOKIE_SECRET": base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
        "PROVIDER": "oidc",
        "ALLOWED_GROUPS": "ada",
        "OIDC_EMAIL_CLAIM": "sub",
        "OIDC_GROUPS_CLAIM": "sub",
        "SCOPE": "openid",
        "COOKIE_NAME": SESSION,
        "COOKIE_SECURE": "false",
        "COOKIE_REFRESH": "1s",
    }
    return {**os.environ, **{f"OAUTH2_PROXY_{name}": value for name, value in ours.items()}}


@contextmanager
def signing_in(provider: Provider, admins: str) -> Iterator[tuple[Door, httpx.Client]]:
    """Run oauth2-proxy behind nginx; yields the door and a browser."""
    [port] = pick_free(1)
    process = subprocess.Popen([BINARY, f"--config={CONFIG}"], env=variables(provider, port))
    try:
        deadline = time.monotonic() + 30
        while True:
            assert process.poll() is None, "oauth2-proxy ended"
            assert time.monotonic() < deadline
            try:
                httpx.get(f"http://127.0.0.1:{port}/ping", trust_env=False).raise_for_status()
            except httpx.TransportError:
                time.sleep(0.05)
            else:
                break
        with (
            open_door(OAUTH2_PROXY=f"127.0.0.1:{port}", ADMIN_GROUPS=admins) as door,
            httpx.Client(
                base_url=f"http://127.0.0.1:{door.port}", headers=BROWSER, trust_env=False
            ) as browser,
        ):
            yield door, browser
    finally:
        process.terminate()
        process.wait(10)


def follow(browser: httpx.Client, answer: httpx.Response) -> httpx.Response:
    """Go where the answers say; the public address of the callback is our door."""
    for _ in range(_MAX_REDIRECTS):
        if not answer.is_redirect:
            return answer
        location = answer.url.join(answer.headers["location"])
        if str(location).startswith(CALLBACK):
            location = browser.base_url.join(
                f"{PREFIX}/oauth2/callback?{urlsplit(str(location)).query}"
            )
        answer = browser.get(location)
    raise AssertionError("it goes round in circles")


def test_a_browser_signs_in_and_comes_back_to_its_page(provider: Provider) -> None:
    with signing_in(provider, admins="ada") as (door, browser):
        page = follow(browser, browser.get("/dashboard/nodes"))
        assert (page.status_code, page.text) == (200, "dashboard")
        assert page.url.path == f"{PREFIX}/dashboard/nodes"
        console = browser.get(f"{PREFIX}/console/")
        assert console.text == "console"
        assert door.console.seen[-1].headers["x-auth-request-email"] == "ada"
        # For the API it is nobody.
        browser.get(f"{PREFIX}/v1/models")
        assert not {"cookie", "authorization"} & set(door.gateway.seen[-1].headers)


def test_the_cookie_of_a_session_is_for_our_pages_only(provider: Provider) -> None:
    with signing_in(provider, admins="ada") as (_, browser):
        follow(browser, browser.get("/docs"))
        ours = [cookie for cookie in browser.cookies.jar if cookie.name.startswith(SESSION)]
        assert {cookie.path for cookie in ours} == {PREFIX}
        for cookie in ours:
            assert cookie.has_nonstandard_attr("HttpOnly")
            assert cookie.get_nonstandard_attr("SameSite") == "Lax"


def test_who_is_no_admin_does_not_see_the_dashboard(provider: Provider) -> None:
    with signing_in(provider, admins="root") as (door, browser):
        page = follow(browser, browser.get("/dashboard/"))
        assert page.status_code == 403
        assert "text/html" in page.headers["content-type"]
        assert browser.get(f"{PREFIX}/docs").status_code == 200
        assert door.dashboard.seen == []


def test_a_session_is_renewed_while_it_is_used(provider: Provider) -> None:
    with signing_in(provider, admins="ada") as (_, browser):
        follow(browser, browser.get("/docs"))
        deadline = time.monotonic() + 30
        while "set-cookie" not in (page := browser.get(f"{PREFIX}/docs")).headers:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert page.status_code == 200
        assert browser.get(f"{PREFIX}/docs").status_code == 200


def test_who_signs_out_has_to_sign_in_again(provider: Provider) -> None:
    with signing_in(provider, admins="ada") as (_, browser):
        follow(browser, browser.get("/docs"))
        page = follow(browser, browser.get(f"{PREFIX}/oauth2/sign_out"))
        assert "signed out" in page.text
        assert browser.get(f"{PREFIX}/docs").status_code == 302


@pytest.mark.parametrize("rd", ["https://evil.example/", "//evil.example", "/\\evil.example"])
def test_a_sign_in_ends_at_a_page_of_ours(provider: Provider, rd: str) -> None:
    with signing_in(provider, admins="ada") as (_, browser):
        page = follow(browser, browser.get(f"{PREFIX}/oauth2/start", params={"rd": rd}))
        assert page.url.host == "127.0.0.1"
        assert page.url.path == f"{PREFIX}/docs"
