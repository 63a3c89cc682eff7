"""An issuer on a real port that comes, goes and rotates its keys, and tokens good and forged."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jwt
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from fastapi import FastAPI

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
    # Addresses that nobody should ask for.
    strange: list[str] = field(default_factory=list)
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

        @app.api_route("/{path:path}", methods=["GET", "POST"])
        async def elsewhere(path: str) -> dict[str, Any]:
            self.strange.append(path)
            return {"keys": [public_jwk(ATTACKER_KEY, "x")]}

        return app


@contextmanager
def running_issuer() -> Iterator[Issuer]:
    """Run an issuer until the block ends."""
    issuer = Issuer()
    issuer.start()
    try:
        yield issuer
    finally:
        issuer.stop()


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


def sign_hmac(claims: dict[str, Any], secret: bytes) -> str:
    """Return a token that says HS256, signed with `secret`; PyJWT refuses to make some of them."""
    body = f"{segment({'alg': 'HS256', 'typ': 'JWT', 'kid': 'rsa'})}.{segment(claims)}"
    return f"{body}.{segment(hmac.digest(secret, body.encode(), hashlib.sha256))}"


def with_raw_payload(payload: bytes, **header: str) -> str:
    """Return a token whose signature is right and whose payload is `payload`."""
    return jwt.PyJWS().encode(payload, RSA_KEY, "RS256", {"kid": "rsa", "typ": "JWT"} | header)


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


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
