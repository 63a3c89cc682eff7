"""Verification of access tokens: RFC 7519 (JWT), RFC 8725 (best practice), RFC 9068.

A token is refused unless every rule here and in `claims` says yes. What a refusal says never
shows any part of the token.
"""

from __future__ import annotations

import json
import time
from base64 import urlsafe_b64decode
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx
import jwt
import orjson

from serve_app.errors import AuthenticationFailed
from serve_app.identity.claims import ClaimRules, TrustedIssuer, to_principal
from serve_app.identity.digest import digest_of
from serve_app.identity.discovery import Discovery
from serve_app.identity.introspection import IntrospectionPolicy, Introspector
from serve_app.identity.jwks import ALLOWED_ALGORITHMS, IssuerKeys, KeyPolicy, VerificationKey
from serve_app.identity.principal import Principal
from serve_app.identity.token_cache import TokenCache

MAX_TOKEN_CHARS = 16 * 1024

_MAX_KID_CHARS = 256
_HEADER_TYPES = frozenset({"jwt", "at+jwt", "application/at+jwt"})
# Headers that bring or point to a key, demand an extension that we do not know, or say that
# another token is inside.
_REFUSED_HEADERS = frozenset({"jku", "jwk", "x5u", "x5c", "crit", "cty", "zip", "b64"})
_JWS = jwt.PyJWS()
_NO_CREDENTIAL = "The credential is neither an API key nor a token."


class TokenVerifier:
    """Chooses the issuer of a token, which then checks it.

    A signed token names its issuer itself. Before its signature is checked that is only a claim:
    it chooses among `issuers` and nothing else. An opaque token names nobody, so only one issuer
    may be asked for such; else one would get to see the tokens of another.
    """

    def __init__(self, issuers: Sequence[OidcVerifier]) -> None:
        self._issuers = {issuer.url: issuer for issuer in issuers}
        self._introspecting = next((issuer for issuer in issuers if issuer.introspects), None)
        self._names = tuple(f"{issuer.name}:" for issuer in issuers if issuer.name is not None)

    def start(self) -> None:
        """Begin to fetch the issuers' keys; never waits and never fails while one is away."""
        for issuer in self._issuers.values():
            issuer.start()

    async def close(self) -> None:
        """Stop the background work."""
        for issuer in self._issuers.values():
            await issuer.close()

    async def verify(self, token: str) -> Principal:
        """Return the principal that `token` names.

        Raises:
            AuthenticationFailed: the token is not valid here.
            IdentityUnavailable: it cannot be checked now.
        """
        _check_length(token)
        issuer = self._chosen(token)
        principal = await issuer.verify(token)
        # Whoever may choose a name at the first issuer must not choose one of another's.
        if issuer.name is None and principal.id.startswith(self._names):
            raise AuthenticationFailed("The access token has no valid `sub`.")
        return principal

    def _chosen(self, token: str) -> OidcVerifier:
        if not is_signed(token):
            if self._introspecting is None:
                raise AuthenticationFailed(_NO_CREDENTIAL)
            return self._introspecting
        issuer = self._issuers.get(_claimed_issuer(token))
        if issuer is None:
            raise AuthenticationFailed("The access token comes from another issuer.")
        return issuer


class OidcVerifier:
    """Turns access tokens of one issuer into principals.

    Args:
        http: used for the issuer only, and not closed here.
        cache_s: how long a verified token is believed without a new look at its signature.
        now: Unix seconds, for the claims.
        clock: monotonic seconds, for the caches.
    """

    def __init__(
        self,
        issuer: TrustedIssuer,
        http: httpx.AsyncClient,
        *,
        key_policy: KeyPolicy | None = None,
        introspection_policy: IntrospectionPolicy | None = None,
        cache_s: float = 60.0,
        cache_size: int = 10_000,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._issuer = issuer
        self._rules = ClaimRules(issuer, now)
        discovery = Discovery(issuer.url, http, issuer.discovery_url)
        self._keys = IssuerKeys(discovery, http, policy=key_policy, clock=clock)
        self._introspector = (
            None
            if issuer.introspection_secret is None
            else Introspector(
                issuer, discovery, self._rules, http, policy=introspection_policy, clock=clock
            )
        )
        self._cache_s = cache_s
        self._cache: TokenCache[tuple[Principal, float]] = TokenCache(cache_size, clock)

    @property
    def url(self) -> str:
        """The issuer, without a slash at its end."""
        return self._issuer.url.rstrip("/")

    @property
    def name(self) -> str | None:
        """The name of a further issuer."""
        return self._issuer.name

    @property
    def introspects(self) -> bool:
        """Whether its opaque tokens are asked for."""
        return self._introspector is not None

    def start(self) -> None:
        """Begin to fetch the issuer's keys; never waits and never fails while it is away."""
        self._keys.start()

    async def close(self) -> None:
        """Stop the background refresh and the calls that are under way."""
        await self._keys.close()
        if self._introspector is not None:
            await self._introspector.close()

    async def verify(self, token: str) -> Principal:
        """Return the principal that `token` names.

        Raises:
            AuthenticationFailed: the token is not valid here.
            IdentityUnavailable: the issuer is needed and away.
        """
        _check_length(token)
        if self._introspector is not None and not is_signed(token):
            return await self._introspector.verify(token)
        digest = digest_of(token)
        known = self._cache.get(digest, self._cache_s)
        if known is not None:
            principal, expires_at = known
            self._rules.check_expiry(expires_at)
            return principal
        claims = await self._verified_claims(token)
        expires_at = self._rules.check(claims)
        principal = to_principal(claims, self._issuer)
        self._cache.put(digest, (principal, expires_at))
        return principal

    async def _verified_claims(self, token: str) -> dict[str, Any]:
        header = _read_header(token)
        key = await self._keys.get(_check_header(header))
        algorithm = header["alg"]
        if algorithm not in key.algorithms:
            raise AuthenticationFailed("The access token's algorithm does not fit its key.")
        return _check_signature(token, key, algorithm)


def is_signed(token: str) -> bool:
    """Tell whether `token` has the form of a signed JWT (RFC 7515 §7.1); others are opaque."""
    return token.count(".") == 2


def _check_length(token: str) -> None:
    if len(token) > MAX_TOKEN_CHARS:
        raise AuthenticationFailed("The access token is too long.")


def _claimed_issuer(token: str) -> str:
    """Return the `iss` that a token claims, without a slash at its end. Nothing is verified."""
    try:
        claims = orjson.loads(_decoded(token.split(".")[1]))
    except ValueError:
        raise AuthenticationFailed(_NO_CREDENTIAL) from None
    issuer = claims.get("iss") if isinstance(claims, dict) else None
    return issuer.rstrip("/") if isinstance(issuer, str) else ""


def _read_header(token: str) -> dict[str, Any]:
    # PyJWT's own reader takes the whole token apart, and checks each letter of it in Python.
    try:
        header = json.loads(_decoded(token.split(".")[0]), object_pairs_hook=_once)
    except (ValueError, RecursionError):
        raise AuthenticationFailed(_NO_CREDENTIAL) from None
    if not isinstance(header, dict):
        raise AuthenticationFailed(_NO_CREDENTIAL)
    return header


def _decoded(segment: str) -> bytes:
    """Return the bytes of a segment, which is base64url without padding (RFC 7515 §2).

    Raises:
        ValueError: it is not.
    """
    encoded = segment.encode("ascii")
    return urlsafe_b64decode(encoded + b"=" * (-len(encoded) % 4))


def _check_header(header: Mapping[str, Any]) -> str:
    """Return the `kid` of a header that follows our rules (RFC 8725 §3.1, §3.11)."""
    algorithm = header.get("alg")
    if not isinstance(algorithm, str) or algorithm not in ALLOWED_ALGORITHMS:
        raise AuthenticationFailed("The access token's algorithm is not accepted.")
    if not _REFUSED_HEADERS.isdisjoint(header):
        raise AuthenticationFailed("The access token's header brings its own key or extension.")
    if str(header.get("typ")).lower() not in _HEADER_TYPES:
        raise AuthenticationFailed("The token is not an access token (header `typ`).")
    kid = header.get("kid")
    if not isinstance(kid, str) or not 0 < len(kid) <= _MAX_KID_CHARS:
        raise AuthenticationFailed("The access token does not name its key (`kid`).")
    return kid


def _check_signature(token: str, key: VerificationKey, algorithm: str) -> dict[str, Any]:
    """Return the claims of a token whose signature holds; the claims are not judged here."""
    try:
        signed = _JWS.decode_complete(token, key.key, algorithms=[algorithm])
        claims = json.loads(signed["payload"], object_pairs_hook=_once)
    except (jwt.PyJWTError, ValueError, RecursionError):
        raise AuthenticationFailed("The access token's signature or form is wrong.") from None
    if not isinstance(claims, dict):
        raise AuthenticationFailed("The access token's signature or form is wrong.")
    return claims


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON in which no name stands twice (RFC 7519 §4).

    Raises:
        ValueError: one does. Which value holds would depend on who reads it.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError
    return found
