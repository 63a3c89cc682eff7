"""Opaque access tokens: only their issuer can say what they are (RFC 7662).

The issuer is asked for a token at most once in `cache_s`, by one call for all who wait, and no
more often than `calls_per_s` for tokens that it never called good: made-up ones cannot be used
to flood it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote_plus

import httpx

from serve_app.errors import AuthenticationFailed, IdentityUnavailable
from serve_app.identity.claims import ClaimRules, TrustedIssuer, to_principal
from serve_app.identity.digest import digest_of
from serve_app.identity.discovery import FETCH_ERRORS, Discovery, describe_failure, read_json
from serve_app.identity.principal import Principal
from serve_app.identity.token_cache import TokenCache

logger = logging.getLogger(__name__)

# RFC 6750 §2.1, `b64token`. What does not fit is no token of anybody's: nobody is asked.
_FORM = re.compile(r"[A-Za-z0-9\-._~+/]+=*", re.ASCII)
_NOT_ACTIVE = "The access token is not active: its issuer does not know it, or ended it."


@dataclass(frozen=True, slots=True, kw_only=True)
class IntrospectionPolicy:
    """How often the issuer is asked, and how long its answers hold.

    A good answer holds for `cache_s`, and for `outage_s` while the issuer is away, never past
    the token's `exp`; a bad one for `refused_s`. After a failure the issuer is not asked for
    `retry_s`. Of calls for tokens that were never good at most `max_calls` are under way, and
    `burst` more than `calls_per_s` may begin in a second after a quiet time.
    """

    cache_s: float = 60.0
    outage_s: float = 300.0
    refused_s: float = 30.0
    retry_s: float = 1.0
    timeout_s: float = 5.0
    calls_per_s: float = 20.0
    burst: int = 20
    max_calls: int = 64
    cache_size: int = 10_000


@dataclass(frozen=True, slots=True)
class _Good:
    """A token that the issuer called active and that keeps our rules."""

    principal: Principal
    expires_at: float


class Introspector:
    """Turns opaque tokens of one issuer into principals.

    Args:
        issuer: has an `introspection_secret`.
        http: used for the issuer only, and not closed here.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        issuer: TrustedIssuer,
        discovery: Discovery,
        rules: ClaimRules,
        http: httpx.AsyncClient,
        *,
        policy: IntrospectionPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._issuer = issuer
        self._discovery = discovery
        self._rules = rules
        self._http = http
        self._policy = policy or IntrospectionPolicy()
        self._clock = clock
        self._good: TokenCache[_Good] = TokenCache(self._policy.cache_size, clock)
        self._refused: TokenCache[str] = TokenCache(self._policy.cache_size, clock)
        self._budget = _Budget(self._policy.calls_per_s, self._policy.burst, clock)
        self._calls: dict[bytes, asyncio.Task[Principal]] = {}
        self._failed_at: float | None = None

    async def close(self) -> None:
        """End the calls that are under way."""
        calls = list(self._calls.values())
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    async def verify(self, token: str) -> Principal:
        """Return the principal of an opaque token.

        Raises:
            AuthenticationFailed: the issuer does not call it active, or a rule says no.
            IdentityUnavailable: the issuer cannot be asked now and nothing usable is kept.
        """
        if not _FORM.fullmatch(token):
            raise AuthenticationFailed("The credential is neither an API key nor a token.")
        digest = digest_of(token)
        good = self._good.get(digest, self._policy.cache_s)
        if good is not None:
            return self._unexpired(good)
        refused = self._refused.get(digest, self._policy.refused_s)
        if refused is not None:
            raise AuthenticationFailed(refused)
        stale = self._good.get(digest, self._policy.outage_s)
        known = self._good.get(digest, math.inf) is not None
        try:
            return await self._ask(digest, token, known=known)
        except IdentityUnavailable:
            if stale is None:
                raise
            return self._unexpired(stale)

    def _unexpired(self, good: _Good) -> Principal:
        self._rules.check_expiry(good.expires_at)
        return good.principal

    async def _ask(self, digest: bytes, token: str, *, known: bool) -> Principal:
        """Ask the issuer, or wait for the call that already does."""
        call = self._calls.get(digest)
        if call is None:
            self._admit(known=known)
            call = asyncio.create_task(self._answer(digest, token), name="oidc-introspection")
            self._calls[digest] = call
            call.add_done_callback(lambda done: self._ended(digest, done))
        # A client that goes away must not stop the call that others wait for.
        return await asyncio.shield(call)

    def _admit(self, *, known: bool) -> None:
        failed_at = self._failed_at
        if failed_at is not None and self._clock() - failed_at < self._policy.retry_s:
            raise IdentityUnavailable(retry_after_s=self._policy.retry_s)
        # A token that was good is asked for at most once in `cache_s`, and there are no more of
        # them than the issuer gave out: a flood of made-up ones must not keep it waiting.
        if not known and (len(self._calls) >= self._policy.max_calls or not self._budget.take()):
            raise IdentityUnavailable(retry_after_s=1.0)

    def _ended(self, digest: bytes, call: asyncio.Task[Principal]) -> None:
        self._calls.pop(digest, None)
        # Everybody who waited may have gone away: somebody must look at the error.
        if not call.cancelled():
            call.exception()

    async def _answer(self, digest: bytes, token: str) -> Principal:
        claims = await self._fetch(token)
        try:
            good = self._judge(claims)
        except AuthenticationFailed as refusal:
            self._good.pop(digest)
            self._refused.put(digest, refusal.message)
            raise
        self._good.put(digest, good)
        return good.principal

    def _judge(self, answer: Mapping[str, Any]) -> _Good:
        if answer.get("active") is not True:
            raise AuthenticationFailed(_NOT_ACTIVE)
        # Some issuers answer for refresh tokens too, and leave out what kind it is.
        kind = answer.get("token_type", answer.get("typ"))
        if str(kind).lower() != "bearer":
            raise AuthenticationFailed("The token is not an access token. Send the access token.")
        # §2.2: both may be left out. Who answers is the issuer itself; a token without a subject
        # is the client's own.
        claims = {"iss": self._issuer.url, "sub": answer.get("client_id"), **answer}
        expires_at = self._rules.check(claims)
        return _Good(to_principal(claims, self._issuer), expires_at)

    async def _fetch(self, token: str) -> dict[str, Any]:
        try:
            async with asyncio.timeout(self._policy.timeout_s):
                answer = await self._post(token)
        except FETCH_ERRORS as error:
            self._failed_at = self._clock()
            self._discovery.forget()
            logger.warning(
                "the issuer does not say what an opaque token is: %s",
                describe_failure(error),
                extra={
                    "action": "oidc_introspection_failed",
                    "issuer": self._discovery.issuer_url,
                },
            )
            raise IdentityUnavailable(retry_after_s=self._policy.retry_s) from None
        self._failed_at = None
        return answer

    async def _post(self, token: str) -> dict[str, Any]:
        endpoint = await self._discovery.endpoint("introspection_endpoint")
        secret = self._issuer.introspection_secret
        assert secret is not None
        async with self._http.stream(
            "POST",
            endpoint,
            data={"token": token, "token_type_hint": "access_token"},
            headers={"Accept": "application/json"},
            # RFC 6749 §2.3.1: both are form-encoded before they go into the Basic header.
            auth=httpx.BasicAuth(
                quote_plus(self._issuer.client_id), quote_plus(secret.get_secret_value())
            ),
            follow_redirects=False,
        ) as response:
            # Some issuers answer so to what they cannot read. It says nothing of the issuer, and
            # must not make others wait.
            if response.status_code == httpx.codes.BAD_REQUEST:
                return {"active": False}
            return await read_json(response)


class _Budget:
    """A token bucket: `per_s` calls a second, and up to `burst` at once after a quiet time."""

    def __init__(self, per_s: float, burst: int, clock: Callable[[], float]) -> None:
        self._per_s = per_s
        self._burst = float(burst)
        self._clock = clock
        self._left = self._burst
        self._counted_at = clock()

    def take(self) -> bool:
        """Take one call; False where none is left."""
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._counted_at) * self._per_s)
        self._counted_at = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True
