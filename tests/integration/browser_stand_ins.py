"""What stands behind nginx's browser door in tests: small servers that remember what they saw.

`StandInOAuth2Proxy` answers as oauth2-proxy 7.15 does (`AuthOnly`, `authOnlyAuthorize` and
`OAuthStart` in its oauthproxy.go, and its page on endpoints). It holds sessions instead of
making them; tests/integration/test_browser_sign_in.py has the real one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.cookies import SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlencode

import uvicorn

PREFIX = "/api/v1/comp-ai"
COOKIE = "comp_ai_session"
ADMINS = "role:comp-ai:admin"
_ATTRIBUTES = f"Path={PREFIX}; Expires=Wed, 21 Oct 2037 07:28:00 GMT; HttpOnly; Secure"
RENEWED = tuple(f"{COOKIE}_{part}=new{part}; {_ATTRIBUTES}" for part in range(3))


@dataclass
class Seen:
    """One request that arrived."""

    method: str
    path: str
    query: str
    headers: dict[str, str]


@dataclass
class StandIn:
    """Answers 200 to everything, with its name."""

    name: str
    cookie: str = ""
    seen: list[Seen] = field(default_factory=list)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = {key.decode().lower(): value.decode() for key, value in scope["headers"]}
        request = Seen(
            scope["method"], scope["raw_path"].decode(), scope["query_string"].decode(), headers
        )
        self.seen.append(request)
        status, answer = self.answer(request)
        raw = [(name.encode(), value.encode()) for name, value in answer]
        await send({"type": "http.response.start", "status": status, "headers": raw})
        await send({"type": "http.response.body", "body": self.name.encode()})

    def answer(self, request: Seen) -> tuple[int, list[tuple[str, str]]]:
        return 200, [("set-cookie", self.cookie)] if self.cookie else []


class StandInOAuth2Proxy(StandIn):
    """The part of oauth2-proxy that nginx talks to; a session is a cookie with a user's name."""

    # Whether it was set up with another prefix than ours.
    lost = False
    groups = {
        "ada": ["role:comp-ai:user"],
        "root": ["role:comp-ai:user", ADMINS],
        # Due for renewal; they come back in so many parts.
        "old1": ["role:comp-ai:user"],
        "old2": ["role:comp-ai:user"],
        "old3": ["role:comp-ai:user"],
    }

    def answer(self, request: Seen) -> tuple[int, list[tuple[str, str]]]:
        path = request.path.removeprefix(PREFIX)
        query = parse_qs(request.query)
        if path == "/oauth2/auth":
            return (404, []) if self.lost else self._auth(request, query)
        if path == "/oauth2/start":
            state = urlencode({"state": f"nonce:{query['rd'][0]}"})
            return 302, [
                ("location", f"https://issuer.example/auth?{state}"),
                ("set-cookie", f"{COOKIE}_csrf=x; HttpOnly"),
            ]
        if path in ("/oauth2/callback", "/oauth2/sign_out"):
            location = query.get("rd", ["/"])[0]
            return 302, [("location", location), *(("set-cookie", one) for one in RENEWED)]
        return 200, []

    def _auth(
        self, request: Seen, query: dict[str, list[str]]
    ) -> tuple[int, list[tuple[str, str]]]:
        cookies = SimpleCookie(request.headers.get("cookie", ""))
        user = cookies[COOKIE].value if COOKIE in cookies else ""
        parts = int(user.removeprefix("old")) if user.startswith("old") else 0
        renewed = [("set-cookie", one) for one in RENEWED[:parts]]
        if user not in self.groups:
            return 401, [("set-cookie", f"{COOKIE}=; Max-Age=0")]
        allowed = {name for value in query.get("allowed_groups", []) for name in value.split(",")}
        if allowed and not allowed & set(self.groups[user]):
            return 403, renewed
        headers = [
            ("x-auth-request-user", user),
            ("x-auth-request-preferred-username", user.title()),
            ("x-auth-request-email", f"{user}@example.com"),
            ("x-auth-request-groups", ",".join(self.groups[user])),
        ]
        return 202, headers + renewed


@contextmanager
def serving(app: Any) -> Iterator[int]:
    """Serve `app` on a free port of 127.0.0.1; yields the port."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(timeout=10)
