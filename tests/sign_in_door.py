"""A sign-in by code flow for a whole stack: a certified provider, and who asks it for nginx.

`CodeFlow` stands in for oauth2-proxy, which no package index carries: the same addresses, cookies
and answers, and a real authorization code flow with PKCE behind them (RFC 6749 §4.1, RFC 7636).
Its sessions are in memory. tests/integration/test_browser_sign_in.py has the real one.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

import httpx
import jwt
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from tests.integration.browser_stand_ins import COOKIE, PREFIX, StandIn, serving
from tests.integration.oidc_provider import BROWSER, Provider, running_provider
from tests.stack_runner import free_ports

ADMIN, USER = "root", "ada"
ADMINS = "staff/admins"
CALLBACK_PATH = f"{PREFIX}/oauth2/callback"
HTML = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8", "user-agent": "Mozilla/5.0"}
_FLOW_COOKIE = f"{COOKIE}_csrf"


@dataclass(frozen=True)
class _Flow:
    """A sign-in that was begun."""

    state: str
    verifier: str
    nonce: str
    return_to: str


@dataclass
class CodeFlow:
    """The part of oauth2-proxy that nginx talks to."""

    provider: Provider
    callback: str
    flows: dict[str, _Flow] = field(default_factory=dict)
    # The claims of who is signed in, by the value of the cookie.
    sessions: dict[str, dict[str, Any]] = field(default_factory=dict)
    # The last access token of each of them.
    tokens: dict[str, str] = field(default_factory=dict)

    def app(self) -> Starlette:
        """Return the ASGI app."""
        steps = (self.start, self.callback_of_issuer, self.auth, self.sign_out)
        names = ("start", "callback", "auth", "sign_out")
        return Starlette(
            routes=[
                Route(f"{PREFIX}/oauth2/{name}", step)
                for name, step in zip(names, steps, strict=True)
            ]
        )

    async def start(self, request: Request) -> Response:
        """Send the browser to the provider."""
        flow = _Flow(
            state=secrets.token_urlsafe(16),
            verifier=secrets.token_urlsafe(48),
            nonce=secrets.token_urlsafe(16),
            return_to=request.query_params["rd"],
        )
        digest = hashlib.sha256(flow.verifier.encode()).digest()
        query = {
            "client_id": BROWSER[0],
            "response_type": "code",
            "redirect_uri": self.callback,
            "scope": "openid comp-ai:user",
            "state": flow.state,
            "nonce": flow.nonce,
            "code_challenge": base64.urlsafe_b64encode(digest).rstrip(b"=").decode(),
            "code_challenge_method": "S256",
        }
        key = secrets.token_urlsafe(16)
        self.flows[key] = flow
        answer = RedirectResponse(f"{self.provider.url}/auth?{urlencode(query)}", 302)
        answer.set_cookie(_FLOW_COOKIE, key, path=PREFIX, httponly=True, samesite="lax")
        return answer

    async def callback_of_issuer(self, request: Request) -> Response:
        """Redeem the code, begin a session, send the browser back to its page."""
        flow = self.flows.pop(request.cookies.get(_FLOW_COOKIE, ""), None)
        if flow is None or request.query_params.get("state") != flow.state:
            return Response("This sign-in was not begun here.", 403)
        claims = await self._redeem(request.query_params["code"], flow)
        session = secrets.token_urlsafe(32)
        self.sessions[session] = claims
        answer = RedirectResponse(flow.return_to, 302)
        answer.set_cookie(COOKIE, session, path=PREFIX, httponly=True, samesite="lax")
        return answer

    async def _redeem(self, code: str, flow: _Flow) -> dict[str, Any]:
        """Return the claims of the ID token that a code is exchanged for, once checked."""
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": self.callback,
            "code_verifier": flow.verifier,
        }
        async with httpx.AsyncClient(trust_env=False) as http:
            answer = await http.post(f"{self.provider.url}/token", data=form, auth=BROWSER)
            answer.raise_for_status()
            keys = jwt.PyJWKSet.from_dict((await http.get(f"{self.provider.url}/jwks")).json())
        token = answer.json()["id_token"]
        key = keys[jwt.get_unverified_header(token)["kid"]]
        claims: dict[str, Any] = jwt.decode(
            token, key, algorithms=["RS256"], audience=BROWSER[0], issuer=self.provider.url
        )
        assert claims["nonce"] == flow.nonce
        self.tokens[claims["sub"]] = answer.json()["access_token"]
        return claims

    async def auth(self, request: Request) -> Response:
        """Say who asks: 202, 401 without a session, 403 without one of the groups."""
        claims = self.sessions.get(request.cookies.get(COOKIE, ""))
        if claims is None:
            return Response(status_code=401)
        groups = claims.get("groups", [])
        allowed = request.query_params.get("allowed_groups")
        if allowed is not None and not set(allowed.split(",")) & set(groups):
            return Response(status_code=403)
        headers = {
            "X-Auth-Request-User": claims["sub"],
            "X-Auth-Request-Email": f"{claims['sub']}@example.com",
            "X-Auth-Request-Groups": ",".join(groups),
        }
        return Response(status_code=202, headers=headers)

    async def sign_out(self, request: Request) -> Response:
        """End the session."""
        self.sessions.pop(request.cookies.get(COOKIE, ""), None)
        answer = RedirectResponse(request.query_params["rd"], 302)
        answer.delete_cookie(COOKIE, path=PREFIX)
        return answer


@dataclass(frozen=True)
class SignInDoor:
    """What runs around a stack whose pages are for people who are signed in."""

    provider: Provider
    flow: CodeFlow
    console: StandIn
    settings: dict[str, str]


def signed_in(url: str, page: str, name: str) -> tuple[httpx.Client, httpx.Response]:
    """Ask nginx at `url` for `page` as a browser, sign in as `name`, and end where that leads."""
    browser = httpx.Client(base_url=url, headers=HTML, trust_env=False, follow_redirects=True)
    asked = browser.get(page)
    assert asked.status_code == 200, asked.text
    assert "<title>Sign in</title>" in asked.text
    return browser, browser.post(asked.url, data={"login": name})


@contextmanager
def sign_in_door() -> Iterator[SignInDoor]:
    """Run a provider that asks for a name, and what nginx needs; yields the stack's settings."""
    [port] = free_ports(1)
    callback = f"http://127.0.0.1:{port}{CALLBACK_PATH}"
    console = StandIn("console")
    with (
        running_provider(callback, asks_for_name=True) as provider,
        serving((flow := CodeFlow(provider, callback)).app()) as proxy_port,
        serving(console) as console_port,
    ):
        settings = {
            "COMP_AI_HTTP_PORT": str(port),
            "COMP_AI_NGINX_OAUTH2_PROXY": f"127.0.0.1:{proxy_port}",
            "COMP_AI_NGINX_CONSOLE": f"127.0.0.1:{console_port}",
            "COMP_AI_NGINX_ADMIN_GROUPS": ADMINS,
        }
        yield SignInDoor(provider, flow, console, settings)
