"""What an OpenID Connect issuer says of itself: OpenID Connect Discovery 1.0 §4, RFC 8414 §3."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import httpx
import orjson

_MAX_DOCUMENT_BYTES = 1024 * 1024

# What `get_json` and those that call it may raise for an issuer that is away or no issuer.
FETCH_ERRORS = (httpx.HTTPError, httpx.InvalidURL, ValueError, TimeoutError)


class Discovery:
    """The addresses of one issuer, read when the first is asked for and kept until `forget`.

    Args:
        issuer_url: the issuer; its document must name it.
        http: not closed here.
        url: where the document is, if not below the issuer's own address.
    """

    def __init__(self, issuer_url: str, http: httpx.AsyncClient, url: str | None = None) -> None:
        self.issuer_url = issuer_url.rstrip("/")
        self._url = url or discovery_address(issuer_url)
        self._http = http
        self._document: dict[str, Any] | None = None
        self._reading = asyncio.Lock()

    async def endpoint(self, field: str) -> str:
        """Return the address in `field`, such as `jwks_uri`.

        Raises:
            httpx.HTTPError: no answer.
            ValueError: the document is not this issuer's, or it has no such address.
        """
        async with self._reading:
            if self._document is None:
                document = await get_json(self._http, self._url)
                check_issuer(document, self.issuer_url)
                self._document = document
        return required_url(self._document, field)

    def forget(self) -> None:
        """Read the document again at the next call: an address may have moved."""
        self._document = None


def discovery_address(issuer_url: str) -> str:
    """Return where an issuer keeps its discovery document (OpenID Connect Discovery §4)."""
    return f"{issuer_url.rstrip('/')}/.well-known/openid-configuration"


async def get_json(http: httpx.AsyncClient, url: str) -> dict[str, Any]:
    """Return the JSON object at `url`. No redirect is followed; at most 1 MiB is read.

    Raises:
        httpx.HTTPError: no answer or an error status.
        ValueError: not a JSON object, or too large.
    """
    async with http.stream("GET", url, follow_redirects=False) as response:
        return await read_json(response)


async def read_json(response: httpx.Response) -> dict[str, Any]:
    """Return the JSON object of a response that is being streamed.

    Raises:
        httpx.HTTPError: it broke off.
        ValueError: another status than 200, not a JSON object, or more than 1 MiB.
    """
    if response.status_code != httpx.codes.OK:
        raise ValueError(f"status {response.status_code}")
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > _MAX_DOCUMENT_BYTES:
            raise ValueError("the document is too large")
    document = orjson.loads(body)
    if not isinstance(document, dict):
        raise ValueError("not a JSON object")
    return document


def check_issuer(document: Mapping[str, Any], issuer_url: str) -> None:
    """Check that a discovery document is the issuer's own (OpenID Connect Discovery §4.3).

    Raises:
        ValueError: it names another issuer; a trailing slash makes no difference.
    """
    issuer = document.get("issuer")
    if not isinstance(issuer, str) or issuer.rstrip("/") != issuer_url.rstrip("/"):
        raise ValueError("the discovery document names another issuer")


def required_url(document: Mapping[str, Any], field: str) -> str:
    """Return the http(s) address in `field` of a discovery document.

    Raises:
        ValueError: it is missing or no such address.
    """
    url = document.get(field)
    if not isinstance(url, str) or not url.startswith(("https://", "http://")):
        raise ValueError(f"the discovery document has no {field}")
    return url


def describe_failure(error: Exception) -> str:
    """Return `error` for a log line: our own words, or the class of a foreign error."""
    if type(error) is ValueError:
        return str(error)
    return type(error).__name__
