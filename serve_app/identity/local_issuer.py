"""A small OpenID provider for one machine, where no Keycloak runs.

It serves discovery, its key set and the client credentials grant (RFC 6749 §4.4). Its tokens
look like Keycloak's access tokens, so the gateway needs no second way to check them. It speaks
plain HTTP: keep it on the loopback address.

    python -m serve_app.identity.local_issuer --folder DIR --host 127.0.0.1 --port 3003
"""

from __future__ import annotations

import argparse
import base64
import binascii
import hmac
import secrets
import time
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, unquote_plus

import orjson
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from serve_app.errors import ConfigError
from serve_app.identity.principal import Permission
from serve_app.identity.signing_key import ALGORITHM, SigningKey, create_private_file
from serve_app.identity.token_client import fetch_token, find_token_endpoint

__all__ = [
    "IssuerClient",
    "IssuerConfig",
    "create_issuer",
    "fetch_token",
    "find_token_endpoint",
    "load_clients",
    "mint_token",
]

SERVICE_CLIENT = "comp-ai-service"
DEFAULT_AUDIENCE = "comp-ai-service"

_CLIENTS_FILE = "clients.json"
_MAX_FORM_BYTES = 16 * 1024
_NO_STORE = {"Cache-Control": "no-store", "Pragma": "no-cache"}  # RFC 6749 §5.1
_NO_SECRET = secrets.token_urlsafe(32)


class IssuerClient(BaseModel):
    """A client that may fetch tokens for itself, with the realm roles of these tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    client_id: str = Field(min_length=1, max_length=255)
    secret: SecretStr = Field(min_length=32)
    roles: tuple[str, ...] = (Permission.USER.value,)


class _Clients(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    clients: tuple[IssuerClient, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class IssuerConfig:
    """What the issuer serves: `folder` keeps its key and its clients."""

    folder: Path
    issuer_url: str
    audience: str = DEFAULT_AUDIENCE
    token_lifetime_s: int = 300


class OAuthError(Exception):
    """An error of the token endpoint, in the words of RFC 6749 §5.2."""

    def __init__(self, code: str, description: str, status: int = 400) -> None:
        super().__init__(description)
        self.code = code
        self.description = description
        self.status = status

    def to_response(self) -> JSONResponse:
        """Return the error as the client gets it."""
        headers = dict(_NO_STORE)
        if self.status == 401:
            headers["WWW-Authenticate"] = 'Basic realm="comp-ai", charset="UTF-8"'
        body = {"error": self.code, "error_description": self.description}
        return JSONResponse(body, self.status, headers)


def create_issuer(config: IssuerConfig) -> FastAPI:
    """Return the issuer's application; makes its key and its first client if there are none.

    Raises:
        ConfigError: the key or the clients of the folder cannot be read.
    """
    key = SigningKey.load_or_create(config.folder)
    clients = {client.client_id: client for client in load_clients(config.folder)}
    app = FastAPI(title="Comp AI local issuer", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/.well-known/openid-configuration")
    async def discovery() -> dict[str, object]:
        return _discovery(config.issuer_url.rstrip("/"))

    @app.get("/jwks")
    async def jwks() -> dict[str, object]:
        return {"keys": [key.to_jwk()]}

    @app.post("/token")
    async def token(request: Request) -> JSONResponse:
        try:
            client = await _authenticated_client(request, clients)
        except OAuthError as error:
            return error.to_response()
        return JSONResponse(_grant(config, key, client), headers=_NO_STORE)

    return app


def mint_token(
    folder: Path,
    *,
    issuer_url: str,
    audience: str,
    subject: str,
    roles: Collection[str],
    expires_in_s: float,
    authorized_party: str = SERVICE_CLIENT,
) -> str:
    """Sign an access token for `subject` directly; whoever reads the folder may do that.

    Raises:
        ConfigError: the signing key of the folder cannot be read.
    """
    key = SigningKey.load_or_create(folder)
    issued = IssuerConfig(folder=folder, issuer_url=issuer_url, audience=audience)
    return key.sign(_claims(issued, subject, subject, authorized_party, roles, expires_in_s))


def load_clients(folder: Path) -> tuple[IssuerClient, ...]:
    """Return the clients of `folder`; the first call makes one with a random secret.

    Raises:
        ConfigError: the file is not one of clients. Its content is not shown.
    """
    path = folder / _CLIENTS_FILE
    if not path.exists():
        create_private_file(path, _first_clients())
    try:
        return _Clients.model_validate_json(path.read_bytes()).clients
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"]) or "JSON"
        raise ConfigError("clients", str(path), f"a list of clients; see {where}") from None


def _first_clients() -> bytes:
    client = {
        "client_id": SERVICE_CLIENT,
        "secret": secrets.token_urlsafe(32),
        "roles": [Permission.USER.value],
    }
    return orjson.dumps({"clients": [client]}, option=orjson.OPT_INDENT_2)


def _discovery(issuer_url: str) -> dict[str, object]:
    return {
        "issuer": issuer_url,
        "jwks_uri": f"{issuer_url}/jwks",
        "token_endpoint": f"{issuer_url}/token",
        "grant_types_supported": ["client_credentials"],
        "response_types_supported": [],
        "subject_types_supported": ["public"],
        "id_token_signing_alg_values_supported": [ALGORITHM],
        "token_endpoint_auth_methods_supported": ["client_secret_basic", "client_secret_post"],
    }


def _grant(config: IssuerConfig, key: SigningKey, client: IssuerClient) -> dict[str, object]:
    name = f"service-account-{client.client_id}"
    lifetime_s = config.token_lifetime_s
    claims = _claims(config, name, name, client.client_id, client.roles, lifetime_s)
    return {"access_token": key.sign(claims), "token_type": "Bearer", "expires_in": lifetime_s}


def _claims(
    config: IssuerConfig,
    subject: str,
    username: str,
    authorized_party: str,
    roles: Collection[str],
    expires_in_s: float,
) -> dict[str, object]:
    now = int(time.time())
    return {
        "iss": config.issuer_url.rstrip("/"),
        "sub": subject,
        "aud": config.audience,
        "azp": authorized_party,
        "iat": now,
        "nbf": now,
        "exp": now + int(expires_in_s),
        "jti": str(uuid.uuid4()),
        "typ": "Bearer",
        "realm_access": {"roles": sorted(roles)},
        "preferred_username": username,
    }


async def _authenticated_client(
    request: Request, clients: Mapping[str, IssuerClient]
) -> IssuerClient:
    """Return the client of a valid token request.

    Raises:
        OAuthError: it is not valid, or the client is not known.
    """
    form = await _read_form(request)
    client_id, secret = _read_credentials(request, form)
    client = clients.get(client_id)
    # Compared also for an unknown client, so that the answer takes the same time.
    expected = client.secret.get_secret_value() if client else _NO_SECRET
    same = hmac.compare_digest(secret.encode(), expected.encode())
    if client is None or not same:
        raise OAuthError("invalid_client", "Unknown client or wrong secret.", 401)
    if form["grant_type"] != "client_credentials":
        raise OAuthError("unsupported_grant_type", "Only client_credentials is served.")
    if form.get("scope"):
        raise OAuthError("invalid_scope", "Scopes are not served; a client has its roles.")
    return client


async def _read_form(request: Request) -> dict[str, str]:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/x-www-form-urlencoded":
        raise OAuthError("invalid_request", "Send application/x-www-form-urlencoded.")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_FORM_BYTES:
            raise OAuthError("invalid_request", "The form is too large.", 413)
    try:
        pairs = parse_qsl(body.decode("utf-8"), keep_blank_values=True, errors="strict")
    except ValueError:
        raise OAuthError("invalid_request", "The form cannot be read.") from None
    form = dict(pairs)
    if len(form) != len(pairs):
        raise OAuthError("invalid_request", "A parameter is repeated.")  # RFC 6749 §3.2
    if "grant_type" not in form:
        raise OAuthError("invalid_request", "grant_type is missing.")
    return form


def _read_credentials(request: Request, form: Mapping[str, str]) -> tuple[str, str]:
    """Return client id and secret from the header or from the form (RFC 6749 §2.3.1)."""
    header = request.headers.get("authorization")
    if header is None:
        if "client_id" not in form or "client_secret" not in form:
            raise OAuthError("invalid_client", "No client credentials were sent.", 401)
        return form["client_id"], form["client_secret"]
    if "client_secret" in form:
        raise OAuthError("invalid_request", "Two ways of client authentication at once.")
    return _decode_basic(header)


def _decode_basic(header: str) -> tuple[str, str]:
    scheme, _, encoded = header.partition(" ")
    try:
        decoded = base64.b64decode(encoded.strip(), validate=True).decode("utf-8")
    except (binascii.Error, ValueError):
        decoded = ""
    if scheme.lower() != "basic" or ":" not in decoded:
        raise OAuthError("invalid_client", "The Authorization header is not Basic.", 401)
    client_id, _, secret = decoded.partition(":")
    return unquote_plus(client_id), unquote_plus(secret)


def main(arguments: list[str] | None = None) -> None:
    """Run the issuer until it is stopped."""
    parser = argparse.ArgumentParser(prog="python -m serve_app.identity.local_issuer")
    parser.add_argument("--folder", type=Path, required=True, help="keeps the key and clients")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, required=True, help="port to listen on")
    parser.add_argument("--issuer-url", help="`iss` of the tokens; default http://HOST:PORT")
    parser.add_argument("--audience", default=DEFAULT_AUDIENCE, help="`aud` of the tokens")
    options = parser.parse_args(arguments)
    config = IssuerConfig(
        folder=options.folder,
        issuer_url=options.issuer_url or f"http://{options.host}:{options.port}",
        audience=options.audience,
    )
    app = create_issuer(config)
    uvicorn.run(app, host=options.host, port=options.port, access_log=False, log_level="warning")


if __name__ == "__main__":
    main()
