"""What the claims of a token must say, and whom they name: RFC 7519 §4.1, RFC 9068 §2.2.

The same rules hold for a signed token and for what an issuer says of an opaque one (RFC 7662).
What a refusal says never shows any part of the token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import SecretStr

from serve_app.errors import AuthenticationFailed
from serve_app.identity.principal import Permission, Principal
from serve_app.records import PrincipalKind

_MODEL_ROLE_PREFIX = "comp-ai:model:"

_ROLE_PREFIX = "comp-ai:"
_MAX_SUBJECT_CHARS = 255  # OpenID Connect Core §2, `sub`
_MAX_TIME = 2**53
# Only an ID token carries the hash of another token (OpenID Connect Core §3.1.3.6, §3.3.2.11).
_ID_TOKEN_CLAIMS = frozenset({"at_hash", "c_hash", "s_hash"})
_CLIENT_CREDENTIALS = frozenset({"client-credentials", "client_credentials"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustedIssuer:
    """An issuer whose access tokens are accepted, and what they must say.

    `url` is the `iss` of its tokens; a trailing slash makes no difference. They must hold
    `audience`, and come from one of `authorized_parties` (`azp`) unless that is empty. Roles of
    `client_id` count. A further issuer has a `name`, which is put before everything that its
    tokens name, and gives no more than `permissions`. With `introspection_secret` its opaque
    tokens are asked for, as `client_id`.
    """

    url: str
    audience: str
    client_id: str
    name: str | None = None
    discovery_url: str | None = None
    authorized_parties: tuple[str, ...] = ()
    permissions: frozenset[Permission] = frozenset(Permission)
    clock_skew_s: float = 30.0
    introspection_secret: SecretStr | None = None


class ClaimRules:
    """Judges the claims of one issuer's tokens. `now` is Unix seconds."""

    def __init__(self, issuer: TrustedIssuer, now: Callable[[], float] = time.time) -> None:
        self._issuer = issuer
        self._url = issuer.url.rstrip("/")
        self._now = now

    def check(self, claims: Mapping[str, Any]) -> float:
        """Return `exp` of claims that are those of an access token for us.

        Raises:
            AuthenticationFailed: a rule says no.
        """
        _check_is_access_token(claims)
        issuer = claims.get("iss")
        if not isinstance(issuer, str) or issuer.rstrip("/") != self._url:
            raise AuthenticationFailed("The access token comes from another issuer.")
        if self._issuer.audience not in _strings(claims.get("aud")):
            raise AuthenticationFailed("The access token is not meant for this service (`aud`).")
        accepted = self._issuer.authorized_parties
        if accepted and _client(claims) not in accepted:
            raise AuthenticationFailed("This client's access tokens are not accepted (`azp`).")
        return self._check_times(claims)

    def check_expiry(self, expires_at: float) -> None:
        """Raise AuthenticationFailed if `expires_at`, in Unix seconds, is past."""
        # RFC 7519 §4.1.4: not accepted "on or after" that time.
        if self._now() >= expires_at + self._issuer.clock_skew_s:
            raise AuthenticationFailed("The access token has expired. Get a new one.")

    def _check_times(self, claims: Mapping[str, Any]) -> float:
        expires_at = _time_claim(claims, "exp", required=True)
        self.check_expiry(expires_at)
        latest = self._now() + self._issuer.clock_skew_s
        for name in ("nbf", "iat"):
            if _time_claim(claims, name, required=False) > latest:
                raise AuthenticationFailed(f"The access token is not valid yet (`{name}`).")
        return expires_at


def _check_is_access_token(claims: Mapping[str, Any]) -> None:
    # Keycloak names the kind in a claim: Bearer, ID, Refresh, Logout and others.
    if claims.get("typ", "Bearer") != "Bearer" or not _ID_TOKEN_CLAIMS.isdisjoint(claims):
        raise AuthenticationFailed("The token is not an access token. Send the access token.")
    # RFC 7800: only who holds a key may use it. We see no proof of that, so whoever stole the
    # token could use it here.
    if "cnf" in claims:
        raise AuthenticationFailed(
            "The access token is bound to a key (`cnf`). Send a plain bearer token."
        )


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


def to_principal(claims: Mapping[str, Any], issuer: TrustedIssuer) -> Principal:
    """Return the principal of verified `claims`, which may do nothing yet: see `access`.

    Raises:
        AuthenticationFailed: `sub` is missing or unfit for a log line or a database.
    """
    subject = claims.get("sub")
    if not isinstance(subject, str) or not subject.isprintable() or not subject:
        raise AuthenticationFailed("The access token has no valid `sub`.")
    principal_id = _named(issuer, subject)
    if len(principal_id) > _MAX_SUBJECT_CHARS:
        raise AuthenticationFailed("The access token has no valid `sub`.")
    client = _client(claims)
    return Principal(
        id=principal_id,
        kind=PrincipalKind.SERVICE if _is_service(claims, subject) else PrincipalKind.USER,
        roles=frozenset(_roles_here(claims, issuer)),
        groups=frozenset(_named(issuer, group) for group in _groups(claims)),
        client_id=None if client is None else _named(issuer, client),
    )


def _named(issuer: TrustedIssuer, word: str) -> str:
    """Return `word` so that no other issuer's can be the same."""
    return word if issuer.name is None else f"{issuer.name}:{word}"


def _roles_here(claims: Mapping[str, Any], issuer: TrustedIssuer) -> Iterator[str]:
    """Yield roles as this service knows them: ours by their own name, others by the issuer's."""
    for role in _roles(claims, issuer.client_id):
        ours = role in issuer.permissions or role.startswith(_MODEL_ROLE_PREFIX)
        yield role if ours else _named(issuer, role)


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
