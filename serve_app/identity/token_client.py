"""Fetching an access token from an issuer: RFC 6749 §4.4, the client credentials grant."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote_plus

import httpx
import orjson

from serve_app.errors import AuthenticationFailed, IdentityUnavailable
from serve_app.identity.discovery import FETCH_ERRORS, Discovery, describe_failure


async def find_token_endpoint(
    issuer_url: str, http: httpx.AsyncClient, discovery_url: str | None = None
) -> str:
    """Return the issuer's token endpoint (OpenID Connect Discovery 1.0 §4).

    Raises:
        IdentityUnavailable: the issuer does not answer as one.
    """
    try:
        return await Discovery(issuer_url, http, discovery_url).endpoint("token_endpoint")
    except FETCH_ERRORS as error:
        raise IdentityUnavailable(
            f"The issuer {issuer_url} does not answer: {describe_failure(error)}."
        ) from error


async def fetch_token(
    token_endpoint: str, client_id: str, client_secret: str, http: httpx.AsyncClient
) -> str:
    """Return a fresh access token for the client itself.

    Raises:
        AuthenticationFailed: the issuer refuses the client; carries its error code.
        IdentityUnavailable: the issuer does not answer as one.
    """
    # RFC 6749 §2.3.1: both are form-encoded before they go into the Basic header.
    auth = httpx.BasicAuth(quote_plus(client_id), quote_plus(client_secret))
    try:
        response = await http.post(
            token_endpoint,
            data={"grant_type": "client_credentials"},
            auth=auth,
            follow_redirects=False,
        )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise IdentityUnavailable(
            f"The token endpoint does not answer: {type(error).__name__}."
        ) from error
    body = _read_object(response)
    if 400 <= response.status_code < 500:
        raise AuthenticationFailed(f"The issuer refuses the client: {_error_code(body)}.")
    token = body.get("access_token")
    if response.status_code != httpx.codes.OK or not isinstance(token, str):
        raise IdentityUnavailable(f"The token endpoint answers {response.status_code}.")
    return token


def _read_object(response: httpx.Response) -> dict[str, Any]:
    try:
        body = orjson.loads(response.content)
    except orjson.JSONDecodeError:
        return {}
    return body if isinstance(body, dict) else {}


def _error_code(body: dict[str, Any]) -> str:
    """Return the `error` of RFC 6749 §5.2 if it looks like one; it is shown to a person."""
    code = body.get("error")
    fits = isinstance(code, str) and len(code) <= 100 and code.isprintable()
    return str(code) if fits else "no reason given"
