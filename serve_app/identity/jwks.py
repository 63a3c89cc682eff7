"""The signing keys of an OpenID Connect issuer, fetched ahead and kept through outages.

OpenID Connect Discovery 1.0 §4 says where the keys are, RFC 7517 what they look like. Nothing
in a token ever says where to fetch a key: only the configured issuer does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import jwt
import orjson
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from serve_app.errors import AuthenticationFailed, IdentityUnavailable

logger = logging.getLogger(__name__)

RSA_ALGORITHMS = frozenset({"RS256", "RS384", "RS512", "PS256"})
CURVE_ALGORITHMS = {"P-256": frozenset({"ES256"}), "P-384": frozenset({"ES384"})}
ALLOWED_ALGORITHMS = RSA_ALGORITHMS.union(*CURVE_ALGORITHMS.values())

_MIN_RSA_BITS = 2048
_PUBLIC_MEMBERS = frozenset({"kty", "crv", "x", "y", "n", "e"})
_MAX_KEYS = 100
_MAX_DOCUMENT_BYTES = 1024 * 1024
_UNKNOWN_KEY = "The access token is signed with a key that its issuer does not publish."


@dataclass(frozen=True, slots=True)
class VerificationKey:
    """One public key of the issuer and the algorithms that it may verify."""

    key: Any
    algorithms: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyPolicy:
    """When keys are fetched, in seconds."""

    refresh_s: float = 300.0
    first_retry_s: float = 1.0
    max_retry_s: float = 30.0
    demand_interval_s: float = 30.0
    outage_s: float = 24 * 3600.0
    fetch_timeout_s: float = 10.0


class IssuerKeys:
    """Serves the issuer's keys from memory and refreshes them in the background.

    Args:
        issuer_url: the issuer; its discovery document must name it.
        http: not closed here.
        discovery_url: where the document is, if not below the issuer's own address.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        issuer_url: str,
        http: httpx.AsyncClient,
        *,
        policy: KeyPolicy | None = None,
        discovery_url: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._issuer_url = issuer_url.rstrip("/")
        self._discovery_url = discovery_url or discovery_address(issuer_url)
        self._http = http
        self._policy = policy or KeyPolicy()
        self._clock = clock
        self._keys: dict[str, VerificationKey] = {}
        self._jwks_uri: str | None = None
        self._fetched_at: float | None = None
        self._last_failed = False
        self._demanded_at: float | None = None
        self._fetching: asyncio.Task[None] | None = None
        self._refresher: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to fetch; never waits for the issuer and never fails when it is away."""
        if self._refresher is None:
            self._refresher = asyncio.create_task(self._refresh(), name="oidc-keys-refresh")
            self._refresher.add_done_callback(_report_death)

    async def close(self) -> None:
        """Stop fetching."""
        tasks = [task for task in (self._refresher, self._fetching) if task is not None]
        self._refresher = self._fetching = None
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def get(self, kid: str) -> VerificationKey:
        """Return the issuer's key `kid`.

        Raises:
            AuthenticationFailed: the issuer does not publish that key.
            IdentityUnavailable: the issuer cannot be asked and no usable answer is kept.
        """
        if (key := self._cached(kid)) is not None:
            return key
        await self._look_again(kid)
        if (key := self._cached(kid)) is not None:
            return key
        # While the issuer is away, a token may carry a key that was made since: nobody can say
        # that it is wrong.
        if self._last_failed or not self._usable():
            raise IdentityUnavailable(retry_after_s=self._policy.max_retry_s)
        raise AuthenticationFailed(_UNKNOWN_KEY)

    def _cached(self, kid: str) -> VerificationKey | None:
        return self._keys.get(kid) if self._usable() else None

    def _usable(self) -> bool:
        return (
            self._fetched_at is not None
            and self._clock() - self._fetched_at <= self._policy.outage_s
        )

    async def _look_again(self, kid: str) -> None:
        """Fetch for a `kid` that is not known, at most once in each interval.

        The background refresh does not count, else a rotation just after it would be seen late.
        """
        if self._fetching is not None and not self._fetching.done():
            await self._fetch_shared()
            # That fetch may have left before the key was published; if it failed, so would ours.
            if self._last_failed or self._cached(kid) is not None:
                return
        now, last = self._clock(), self._demanded_at
        if last is None or now - last >= self._policy.demand_interval_s:
            self._demanded_at = now
            await self._fetch_shared()

    async def _fetch_shared(self) -> None:
        if self._fetching is None or self._fetching.done():
            self._fetching = asyncio.create_task(self._fetch(), name="oidc-keys-fetch")
        # A client that goes away must not stop the fetch that others wait for.
        await asyncio.shield(self._fetching)

    async def _refresh(self) -> None:
        retry_s = self._policy.first_retry_s
        while True:
            await self._fetch_shared()
            if not self._last_failed:
                retry_s = self._policy.first_retry_s
                await asyncio.sleep(self._policy.refresh_s)
                continue
            await asyncio.sleep(retry_s)
            retry_s = min(retry_s * 2, self._policy.max_retry_s)

    async def _fetch(self) -> None:
        try:
            async with asyncio.timeout(self._policy.fetch_timeout_s):
                keys = await self._download()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, TimeoutError) as error:
            self._last_failed = True
            # The address may have moved: look it up again next time.
            self._jwks_uri = None
            logger.warning(
                "cannot fetch the signing keys of the issuer: %s",
                describe_failure(error),
                extra={"action": "oidc_keys_fetch_failed", "issuer": self._issuer_url},
            )
            return
        self._keys = keys
        self._fetched_at = self._clock()
        if self._last_failed:
            logger.info("the issuer answers again", extra={"action": "oidc_keys_recovered"})
        self._last_failed = False

    async def _download(self) -> dict[str, VerificationKey]:
        if self._jwks_uri is None:
            document = await get_json(self._http, self._discovery_url)
            check_issuer(document, self._issuer_url)
            self._jwks_uri = required_url(document, "jwks_uri")
        keys = parse_jwks(await get_json(self._http, self._jwks_uri))
        if not keys:
            raise ValueError("no usable signing key is published")
        return keys


def discovery_address(issuer_url: str) -> str:
    """Return where an issuer keeps its discovery document (OpenID Connect Discovery §4)."""
    return f"{issuer_url.rstrip('/')}/.well-known/openid-configuration"


async def get_json(http: httpx.AsyncClient, url: str) -> dict[str, Any]:
    """Return the JSON object at `url`. No redirect is followed; at most 1 MiB is read.

    Raises:
        httpx.HTTPError: no answer or an error status.
        ValueError: not a JSON object, or too large.
    """
    body = bytearray()
    async with http.stream("GET", url, follow_redirects=False) as response:
        if response.status_code != httpx.codes.OK:
            raise ValueError(f"status {response.status_code}")
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


def parse_jwks(document: Mapping[str, Any]) -> dict[str, VerificationKey]:
    """Return the usable signing keys of a JWK set (RFC 7517 §5) by `kid`.

    Keys of other kinds are passed over, as §5 asks; so are weak and nameless ones.
    """
    entries = document.get("keys")
    if not isinstance(entries, list):
        raise ValueError("the key set has no keys")
    keys: dict[str, VerificationKey] = {}
    for entry in entries[:_MAX_KEYS]:
        kid = entry.get("kid") if isinstance(entry, dict) else None
        if isinstance(kid, str) and kid not in keys and (key := _parse_key(entry)) is not None:
            keys[kid] = key
    return keys


def _parse_key(entry: dict[str, Any]) -> VerificationKey | None:
    operations = entry.get("key_ops")
    if entry.get("use", "sig") != "sig":
        return None
    if isinstance(operations, list) and "verify" not in operations:
        return None
    algorithms = _fitting_algorithms(entry)
    if not algorithms:
        return None
    # Only the public numbers: a set that leaks its private half must not give us a private key.
    public = {name: value for name, value in entry.items() if name in _PUBLIC_MEMBERS}
    try:
        key = jwt.PyJWK(public, algorithm=min(algorithms)).key
    except (jwt.PyJWTError, ValueError, TypeError):
        return None
    if isinstance(key, RSAPublicKey) and key.key_size < _MIN_RSA_BITS:
        return None
    return VerificationKey(key, algorithms)


def _fitting_algorithms(entry: Mapping[str, Any]) -> frozenset[str]:
    match entry.get("kty"):
        case "RSA":
            fitting = RSA_ALGORITHMS
        case "EC":
            fitting = CURVE_ALGORITHMS.get(str(entry.get("crv")), frozenset())
        case _:
            return frozenset()
    named = entry.get("alg")
    return fitting if named is None else fitting & {str(named)}


def describe_failure(error: Exception) -> str:
    """Return `error` for a log line: our own words, or the class of a foreign error."""
    if type(error) is ValueError:
        return str(error)
    return type(error).__name__


def _report_death(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.critical(
            "the refresh of the signing keys died: %s",
            type(error).__name__,
            extra={"action": "oidc_keys_refresh_died"},
        )
