"""The signing keys of an OpenID Connect issuer, fetched ahead and kept through outages.

RFC 7517 says what they look like. Nothing in a token ever says where to fetch a key: only the
configured issuer does.
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
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from serve_app.errors import AuthenticationFailed, IdentityUnavailable
from serve_app.identity.discovery import (
    FETCH_ERRORS,
    Discovery,
    describe_failure,
    get_json,
)

logger = logging.getLogger(__name__)

RSA_ALGORITHMS = frozenset({"RS256", "RS384", "RS512", "PS256"})
CURVE_ALGORITHMS = {"P-256": frozenset({"ES256"}), "P-384": frozenset({"ES384"})}
ALLOWED_ALGORITHMS = RSA_ALGORITHMS.union(*CURVE_ALGORITHMS.values())

_MIN_RSA_BITS = 2048
_PUBLIC_MEMBERS = frozenset({"kty", "crv", "x", "y", "n", "e"})
_MAX_KEYS = 100
_MAX_WANTED = 100
_MAX_ABSENT = 1000
_UNKNOWN_KEY = "The access token is signed with a key that its issuer does not publish."


@dataclass(frozen=True, slots=True)
class VerificationKey:
    """One public key of the issuer and the algorithms that it may verify."""

    key: Any
    algorithms: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyPolicy:
    """When keys are fetched, in seconds.

    `unknown_key_s` is the least time between two fetches for keys that are not known, `outage_s`
    how long known keys go on working while the issuer is away.
    """

    refresh_s: float = 300.0
    first_retry_s: float = 1.0
    max_retry_s: float = 30.0
    unknown_key_s: float = 5.0
    outage_s: float = 24 * 3600.0
    fetch_timeout_s: float = 10.0


class IssuerKeys:
    """Serves the issuer's keys from memory and refreshes them in the background.

    Args:
        discovery: says where the keys are.
        http: not closed here.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        discovery: Discovery,
        http: httpx.AsyncClient,
        *,
        policy: KeyPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._discovery = discovery
        self._http = http
        self._policy = policy or KeyPolicy()
        self._clock = clock
        self._keys: dict[str, VerificationKey] = {}
        # Asked for, and not in the answer of the last fetch.
        self._absent: set[str] = set()
        # What the next fetch on demand waits for.
        self._wanted: set[str] = set()
        self._fetched_at: float | None = None
        self._last_failed = False
        self._demanded_at: float | None = None
        self._demand: asyncio.Task[None] | None = None
        self._fetching: asyncio.Task[None] | None = None
        self._refresher: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to fetch; never waits for the issuer and never fails when it is away."""
        if self._refresher is None:
            self._refresher = asyncio.create_task(self._refresh(), name="oidc-keys-refresh")
            self._refresher.add_done_callback(_report_death)

    async def close(self) -> None:
        """Stop fetching."""
        tasks = [
            task for task in (self._refresher, self._demand, self._fetching) if task is not None
        ]
        self._refresher = self._demand = self._fetching = None
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def get(self, kid: str) -> VerificationKey:
        """Return the issuer's key `kid`.

        A key that is not known is looked for first, which may take `unknown_key_s`: a key that
        signs as soon as it is made must fail no request.

        Raises:
            AuthenticationFailed: the issuer does not publish that key.
            IdentityUnavailable: the issuer cannot be asked and no usable answer is kept, or too
                many wait for keys that are not known.
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
        if len(self._absent) < _MAX_ABSENT:
            self._absent.add(kid)
        raise AuthenticationFailed(_UNKNOWN_KEY)

    def _cached(self, kid: str) -> VerificationKey | None:
        return self._keys.get(kid) if self._usable() else None

    def _usable(self) -> bool:
        return (
            self._fetched_at is not None
            and self._clock() - self._fetched_at <= self._policy.outage_s
        )

    async def _look_again(self, kid: str) -> None:
        """Wait for a fetch that begins after this call, at most one in each interval.

        The background refresh does not count, else a rotation just after it would be seen late.
        """
        if self._fetching is not None and not self._fetching.done():
            await self._fetch_shared()
            # That fetch may have left before the key was published; if it failed, so would ours.
            if self._last_failed or self._cached(kid) is not None:
                return
        wait_s = self._demand_wait_s()
        if wait_s > 0 and (self._last_failed or kid in self._absent):
            return
        # Who waits holds a request open. Real keys are few; made-up ones must not pile up.
        if wait_s > 0 and kid not in self._wanted and len(self._wanted) >= _MAX_WANTED:
            raise IdentityUnavailable(retry_after_s=self._policy.unknown_key_s)
        self._wanted.add(kid)
        await self._demanded(wait_s)

    def _demand_wait_s(self) -> float:
        if self._demanded_at is None:
            return 0.0
        return max(0.0, self._demanded_at + self._policy.unknown_key_s - self._clock())

    async def _demanded(self, wait_s: float) -> None:
        if self._demand is None or self._demand.done():
            self._demand = asyncio.create_task(
                self._fetch_on_demand(wait_s), name="oidc-keys-demand"
            )
        await asyncio.shield(self._demand)

    async def _fetch_on_demand(self, wait_s: float) -> None:
        await asyncio.sleep(wait_s)
        self._demanded_at = self._clock()
        # From here on it is too late to join: the answer may be older than the question.
        self._demand = None
        self._wanted.clear()
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
        except FETCH_ERRORS as error:
            self._last_failed = True
            self._discovery.forget()
            logger.warning(
                "cannot fetch the signing keys of the issuer: %s",
                describe_failure(error),
                extra={"action": "oidc_keys_fetch_failed", "issuer": self._discovery.issuer_url},
            )
            return
        self._keys = keys
        self._absent.clear()
        self._fetched_at = self._clock()
        if self._last_failed:
            logger.info(
                "the issuer answers again",
                extra={"action": "oidc_keys_recovered", "issuer": self._discovery.issuer_url},
            )
        self._last_failed = False

    async def _download(self) -> dict[str, VerificationKey]:
        uri = await self._discovery.endpoint("jwks_uri")
        keys = parse_jwks(await get_json(self._http, uri))
        if not keys:
            raise ValueError("no usable signing key is published")
        return keys


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


def _report_death(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.critical(
            "the refresh of the signing keys died: %s",
            type(error).__name__,
            extra={"action": "oidc_keys_refresh_died"},
        )
