"""The one place where a request's credential is checked: RFC 6750 bearer tokens and API keys."""

from __future__ import annotations

import time
from collections.abc import Callable

import httpx

from serve_app import lazy_pool
from serve_app.errors import AuthenticationFailed, IdentityUnavailable
from serve_app.identity.api_key_verifier import ApiKeyVerifier
from serve_app.identity.api_keys import KEY_START, ApiKeyStore
from serve_app.identity.claims import TrustedIssuer
from serve_app.identity.introspection import IntrospectionPolicy
from serve_app.identity.issuers_file import LoadedIssuer
from serve_app.identity.jwks import KeyPolicy
from serve_app.identity.key_changes import listen_to
from serve_app.identity.oidc import MAX_TOKEN_CHARS, OidcVerifier, TokenVerifier
from serve_app.identity.principal import Permission, Principal
from serve_app.lazy_pool import LazyPool
from serve_app.settings import OidcSettings, PostgresSettings, Settings

_HTTP_TIMEOUT_S = 5.0
_POOL_SIZE = 4
_SCHEME_CHARS = len("Bearer ")


class BearerAuthenticator:
    """Checks `Authorization: Bearer <API key or access token>`.

    Args:
        oidc: None where no issuer is configured.
        api_keys: also holds the bootstrap key.
        http, pool: closed here, after those that use them.
    """

    def __init__(
        self,
        oidc: TokenVerifier | None,
        api_keys: ApiKeyVerifier,
        *,
        http: httpx.AsyncClient | None = None,
        pool: LazyPool | None = None,
    ) -> None:
        self._oidc = oidc
        self._api_keys = api_keys
        self._http = http
        self._pool = pool

    def start(self) -> None:
        """Start the background work; never waits, and neither issuer nor PostgreSQL need run."""
        self._api_keys.start()
        if self._oidc is not None:
            self._oidc.start()

    async def close(self) -> None:
        """Write what is pending and close what was opened."""
        if self._oidc is not None:
            await self._oidc.close()
        await self._api_keys.close()
        if self._http is not None:
            await self._http.aclose()
        if self._pool is not None:
            await self._pool.close()

    async def authenticate(self, authorization: str | None) -> Principal:
        """Return the principal that an Authorization header value names.

        Raises:
            AuthenticationFailed: no, an unknown, an expired or a revoked credential.
            IdentityUnavailable: it cannot be checked now.
        """
        credential = read_bearer(authorization)
        if credential.startswith(KEY_START) or self._api_keys.is_bootstrap(credential):
            return await self._api_keys.verify(credential)
        if self._oidc is None:
            raise AuthenticationFailed(
                f"This service takes API keys only; they begin with `{KEY_START}`."
            )
        return await self._oidc.verify(credential)


def read_bearer(authorization: str | None) -> str:
    """Return the credential of an Authorization header value (RFC 6750 §2.1, RFC 9110 §11.4).

    Raises:
        AuthenticationFailed: there is none, it is too long, or the scheme is another one.
    """
    if authorization is None or not authorization.strip():
        raise AuthenticationFailed(
            "The Authorization header is missing. "
            "Send `Authorization: Bearer <API key or access token>`."
        )
    if len(authorization) > MAX_TOKEN_CHARS + _SCHEME_CHARS:
        raise AuthenticationFailed("The Authorization header is too long.")
    scheme, _, credential = authorization.strip().partition(" ")
    credential = credential.strip()
    if scheme.lower() != "bearer":
        raise AuthenticationFailed(
            "The Authorization header has another scheme than Bearer. "
            "Send `Authorization: Bearer <API key or access token>`."
        )
    if len(credential.split()) != 1:
        raise AuthenticationFailed("The Authorization header holds no single credential.")
    return credential


def build_authenticator(
    settings: Settings,
    *,
    http: httpx.AsyncClient | None = None,
    pool: LazyPool | None = None,
) -> BearerAuthenticator:
    """Compose the authenticator of one process from `settings`; opens no connection.

    `http` and `pool` replace the ones made here; either way they are closed with the result.
    """
    http = http or httpx.AsyncClient(timeout=_HTTP_TIMEOUT_S)
    pool = pool or build_pool(settings.postgres)
    bootstrap = settings.service.api_key
    api_keys = ApiKeyVerifier(
        ApiKeyStore(pool),
        listen_to(settings.postgres),
        bootstrap_key=None if bootstrap is None else bootstrap.get_secret_value(),
    )
    return BearerAuthenticator(build_oidc(settings, http), api_keys, http=http, pool=pool)


def build_oidc(settings: Settings, http: httpx.AsyncClient) -> TokenVerifier | None:
    """Return the verifier of access tokens, or None where no issuer is configured."""
    oidc = settings.oidc
    issuers = [_further_issuer(oidc, further) for further in settings.further_issuers]
    if oidc.issuer_url is not None:
        issuers.insert(0, _first_issuer(oidc, oidc.issuer_url))
    if not issuers:
        return None
    keys = KeyPolicy(
        refresh_s=oidc.key_refresh_s,
        unknown_key_s=oidc.unknown_key_s,
        outage_s=oidc.key_outage_s,
    )
    introspection = IntrospectionPolicy(
        cache_s=oidc.introspection_cache_s,
        outage_s=oidc.introspection_outage_s,
        calls_per_s=oidc.introspection_rate,
    )
    return TokenVerifier(
        [
            OidcVerifier(issuer, http, key_policy=keys, introspection_policy=introspection)
            for issuer in issuers
        ]
    )


def _first_issuer(oidc: OidcSettings, url: str) -> TrustedIssuer:
    return TrustedIssuer(
        url=url,
        audience=oidc.audience,
        client_id=oidc.client_id,
        discovery_url=oidc.discovery_address,
        authorized_parties=oidc.authorized_parties,
        clock_skew_s=oidc.clock_skew_s,
        introspection_secret=oidc.client_secret if oidc.introspection else None,
    )


def _further_issuer(oidc: OidcSettings, further: LoadedIssuer) -> TrustedIssuer:
    entry = further.entry
    return TrustedIssuer(
        url=further.url,
        audience=entry.audience,
        client_id=entry.client_id,
        name=entry.name,
        discovery_url=None if entry.discovery_url is None else str(entry.discovery_url),
        authorized_parties=entry.authorized_parties,
        permissions=frozenset(map(Permission, entry.permissions)),
        clock_skew_s=oidc.clock_skew_s,
        introspection_secret=further.secret,
    )


def build_pool(
    settings: PostgresSettings, *, clock: Callable[[], float] = time.monotonic
) -> LazyPool:
    """Return the pool of an authenticator."""
    return lazy_pool.build_pool(
        settings,
        application_name="comp-ai-identity",
        max_size=_POOL_SIZE,
        unavailable=IdentityUnavailable,
        name="identity",
        clock=clock,
    )
