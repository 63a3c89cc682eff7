"""Verification of access tokens: RFC 7519 (JWT), RFC 8725 (best practice), RFC 9068.

A token is refused unless every rule here says yes. What a refusal says never shows any part of
the token.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import httpx
import jwt

from serve_app.errors import AuthenticationFailed
from serve_app.identity.jwks import ALLOWED_ALGORITHMS, IssuerKeys, KeyPolicy, VerificationKey
from serve_app.identity.principal import Permission, Principal
from serve_app.records import PrincipalKind

MAX_TOKEN_CHARS = 16 * 1024
MODEL_ROLE_PREFIX = "comp-ai:model:"

_ROLE_PREFIX = "comp-ai:"
_MAX_SUBJECT_CHARS = 255  # OpenID Connect Core §2, `sub`
_MAX_KID_CHARS = 256
_MAX_TIME = 2**53
_HEADER_TYPES = frozenset({"jwt", "at+jwt", "application/at+jwt"})
# Headers that bring or point to a key, or demand an extension that we do not know.
_REFUSED_HEADERS = frozenset({"jku", "jwk", "x5u", "x5c", "crit"})
# Only an ID token carries the hash of another token (OpenID Connect Core §3.1.3.6, §3.3.2.11).
_ID_TOKEN_CLAIMS = frozenset({"at_hash", "c_hash", "s_hash"})
_CLIENT_CREDENTIALS = frozenset({"client-credentials", "client_credentials"})
_SIGNATURE_ONLY: Any = {
    "verify_signature": True,
    **{f"verify_{claim}": False for claim in ("exp", "nbf", "iat", "aud", "iss", "sub", "jti")},
}


class OidcVerifier:
    """Turns access tokens of one issuer into principals.

    Args:
        issuer_url: the `iss` that tokens must carry; a trailing slash makes no difference.
        audience: the `aud` that they must hold.
        client_id: our client, whose client roles count.
        authorized_parties: the `azp` that are accepted; empty accepts every client.
        http: used for the issuer only, and not closed here.
        clock_skew_s: how far apart our clock and the issuer's may be.
        cache_s: how long a verified token is believed without a new look at its signature.
        now: Unix seconds, for the claims.
        clock: monotonic seconds, for the caches.
    """

    def __init__(
        self,
        issuer_url: str,
        audience: str,
        client_id: str,
        authorized_parties: Collection[str],
        http: httpx.AsyncClient,
        clock_skew_s: float = 30.0,
        *,
        key_policy: KeyPolicy | None = None,
        discovery_url: str | None = None,
        cache_s: float = 60.0,
        cache_size: int = 10_000,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._issuer_url = issuer_url.rstrip("/")
        self._audience = audience
        self._client_id = client_id
        self._authorized_parties = tuple(authorized_parties)
        self._clock_skew_s = clock_skew_s
        self._now = now
        self._keys = IssuerKeys(
            issuer_url, http, policy=key_policy, discovery_url=discovery_url, clock=clock
        )
        self._cache = _VerifiedTokens(cache_size, cache_s, clock)

    def start(self) -> None:
        """Begin to fetch the issuer's keys; never waits and never fails while it is away."""
        self._keys.start()

    async def close(self) -> None:
        """Stop the background refresh."""
        await self._keys.close()

    async def verify(self, token: str) -> Principal:
        """Return the principal that `token` names.

        Raises:
            AuthenticationFailed: the token is not valid here.
            IdentityUnavailable: the issuer's keys are not known and cannot be fetched.
        """
        if len(token) > MAX_TOKEN_CHARS:
            raise AuthenticationFailed("The access token is too long.")
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
        known = self._cache.get(digest)
        if known is not None:
            principal, expires_at = known
            self._check_expiry(expires_at)
            return principal
        claims = await self._verified_claims(token)
        self._check_claims(claims)
        principal = to_principal(claims, self._client_id)
        self._cache.put(digest, principal, _time_claim(claims, "exp", required=True))
        return principal

    async def _verified_claims(self, token: str) -> dict[str, Any]:
        header = _read_header(token)
        key = await self._keys.get(_check_header(header))
        algorithm = header["alg"]
        if algorithm not in key.algorithms:
            raise AuthenticationFailed("The access token's algorithm does not fit its key.")
        return _check_signature(token, key, algorithm)

    def _check_claims(self, claims: Mapping[str, Any]) -> None:
        _check_is_access_token(claims)
        issuer = claims.get("iss")
        if not isinstance(issuer, str) or issuer.rstrip("/") != self._issuer_url:
            raise AuthenticationFailed("The access token comes from another issuer.")
        if self._audience not in _strings(claims.get("aud")):
            raise AuthenticationFailed("The access token is not meant for this service (`aud`).")
        party = _client(claims)
        if self._authorized_parties and party not in self._authorized_parties:
            raise AuthenticationFailed("This client's access tokens are not accepted (`azp`).")
        self._check_times(claims)

    def _check_times(self, claims: Mapping[str, Any]) -> None:
        self._check_expiry(_time_claim(claims, "exp", required=True))
        latest = self._now() + self._clock_skew_s
        for name in ("nbf", "iat"):
            if _time_claim(claims, name, required=False) > latest:
                raise AuthenticationFailed(f"The access token is not valid yet (`{name}`).")

    def _check_expiry(self, expires_at: float) -> None:
        # RFC 7519 §4.1.4: not accepted "on or after" that time.
        if self._now() >= expires_at + self._clock_skew_s:
            raise AuthenticationFailed("The access token has expired. Get a new one.")


class _VerifiedTokens:
    """The latest verified tokens by SHA-256, so that no token stays in memory."""

    def __init__(self, size: int, max_age_s: float, clock: Callable[[], float]) -> None:
        self._size = size
        self._max_age_s = max_age_s
        self._clock = clock
        self._entries: OrderedDict[bytes, tuple[Principal, float, float]] = OrderedDict()

    def get(self, digest: bytes) -> tuple[Principal, float] | None:
        """Return the principal and its token's `exp`, or None."""
        entry = self._entries.get(digest)
        if entry is None:
            return None
        principal, expires_at, verified_at = entry
        if self._clock() - verified_at >= self._max_age_s:
            del self._entries[digest]
            return None
        self._entries.move_to_end(digest)
        return principal, expires_at

    def put(self, digest: bytes, principal: Principal, expires_at: float) -> None:
        """Keep a verified token; the least used one makes room."""
        self._entries[digest] = (principal, expires_at, self._clock())
        self._entries.move_to_end(digest)
        if len(self._entries) > self._size:
            self._entries.popitem(last=False)


def _read_header(token: str) -> dict[str, Any]:
    try:
        return jwt.get_unverified_header(token)
    except (jwt.PyJWTError, ValueError, RecursionError):
        # PyJWT's message quotes the token.
        raise AuthenticationFailed("The credential is neither an API key nor a token.") from None


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
        return jwt.decode(token, key.key, algorithms=[algorithm], options=_SIGNATURE_ONLY)
    except (jwt.PyJWTError, ValueError, RecursionError):
        raise AuthenticationFailed("The access token's signature or form is wrong.") from None


def _check_is_access_token(claims: Mapping[str, Any]) -> None:
    # Keycloak names the kind in a claim: Bearer, ID, Refresh, Logout and others.
    if claims.get("typ", "Bearer") != "Bearer" or not _ID_TOKEN_CLAIMS.isdisjoint(claims):
        raise AuthenticationFailed("The token is not an access token. Send the access token.")


def _time_claim(claims: Mapping[str, Any], name: str, *, required: bool) -> float:
    """Return a NumericDate (RFC 7519 §2), or minus infinity for an optional one left out."""
    value = claims.get(name)
    if value is None and not required:
        return -math.inf
    # Refuses JSON's NaN, Infinity and integers beyond a float; true is a number to Python.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise AuthenticationFailed(f"The access token has no valid `{name}`.")
    if not 0 <= value < _MAX_TIME:
        raise AuthenticationFailed(f"The access token has no valid `{name}`.")
    return float(value)


def to_principal(claims: Mapping[str, Any], client_id: str) -> Principal:
    """Return the principal of verified `claims`.

    Raises:
        AuthenticationFailed: `sub` is missing or unfit for a log line or a database.
    """
    subject = claims.get("sub")
    if (
        not isinstance(subject, str)
        or not 0 < len(subject) <= _MAX_SUBJECT_CHARS
        or not subject.isprintable()
    ):
        raise AuthenticationFailed("The access token has no valid `sub`.")
    roles = frozenset(_roles(claims, client_id))
    models = frozenset(
        role.removeprefix(MODEL_ROLE_PREFIX) for role in roles if role.startswith(MODEL_ROLE_PREFIX)
    )
    return Principal(
        id=subject,
        kind=PrincipalKind.SERVICE if _is_service(claims, subject) else PrincipalKind.USER,
        roles=roles,
        groups=frozenset(_groups(claims)),
        client_id=_client(claims),
        permissions=frozenset(permission for permission in Permission if permission in roles),
        models=models or None,
    )


def _roles(claims: Mapping[str, Any], client_id: str) -> Iterator[str]:
    yield from _strings(_dig(claims, "realm_access", "roles"))
    yield from _strings(_dig(claims, "resource_access", client_id, "roles"))
    scope = claims.get("scope")
    plain = _strings(claims.get("roles")) + (scope.split() if isinstance(scope, str) else [])
    yield from (role for role in plain if role.startswith(_ROLE_PREFIX))


def _groups(claims: Mapping[str, Any]) -> Iterator[str]:
    # Keycloak's group mapper writes a path: `/platform/team-a`.
    yield from (group.removeprefix("/") for group in _strings(claims.get("groups")))


def _client(claims: Mapping[str, Any]) -> str | None:
    party = claims.get("azp", claims.get("client_id"))
    return party if isinstance(party, str) else None


def _is_service(claims: Mapping[str, Any], subject: str) -> bool:
    return (
        str(claims.get("preferred_username")).startswith("service-account-")
        or subject in (claims.get("client_id"), claims.get("azp"))
        or str(claims.get("gty")) in _CLIENT_CREDENTIALS
    )


def _dig(value: object, *path: str) -> object:
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _strings(value: object) -> list[str]:
    """Return the strings of a claim that may be one string or a list (RFC 7519 §4.1.3)."""
    if isinstance(value, str):
        return [value]
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []
