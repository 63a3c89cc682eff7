"""Sign-ins that fail: counted for each client address, and answered with 429 when too many.

A good credential always passes, so that nobody is shut out by others behind the same address: what
is refused is only what would be refused anyway. It is not this that keeps a key from being guessed,
but its 256 random bits; this slows honest programs down that have a credential which ended, and
tells the operator of both. Each gateway counts for itself.
"""

from __future__ import annotations

import enum
import ipaddress
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from serve_app.errors import AuthenticationFailed, TooManyFailedSignIns
from serve_app.identity.api_keys import KEY_START
from serve_app.identity.principal import Authenticator, Principal

logger = logging.getLogger(__name__)

_MINUTE_S = 60.0
# An IPv6 customer has a network of at least this length to choose addresses from.
_IPV6_PREFIX = 64
_UNKNOWN = "unknown"
# What sums of seconds may be off by.
_ROUNDING_S = 1e-6


class CredentialKind(enum.StrEnum):
    """What was sent to sign in with."""

    API_KEY = "api_key"
    TOKEN = "token"  # noqa: S105 - a kind of credential, not one
    NONE = "none"


class SignInMetrics(Protocol):
    """Counts sign-ins that failed."""

    def sign_in_failed(self, kind: CredentialKind, *, limited: bool) -> None:
        """Count one; `limited` where it was answered with 429."""
        ...


class SignIns:
    """Checks credentials, and counts those that fail.

    Args:
        authenticator: checks them.
        metrics: is told of each that fails.
        addresses: of how many client addresses failures are remembered; the least recent go.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        metrics: SignInMetrics,
        *,
        addresses: int = 10_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._authenticator = authenticator
        self._metrics = metrics
        self._failures = _Failures(addresses, clock)

    async def check(
        self, authorization: str | None, address: str | None, per_minute: int | None
    ) -> Principal:
        """Return the principal that an Authorization header value names.

        Args:
            address: where it comes from.
            per_minute: how many failures an address may have at once, and anew in each minute;
                None is any number.

        Raises:
            AuthenticationFailed: no, an unknown, an expired or a revoked credential.
            TooManyFailedSignIns: the same, too often.
            IdentityUnavailable: it cannot be checked now.
        """
        try:
            return await self._authenticator.authenticate(authorization)
        except AuthenticationFailed as error:
            self._note_failure(kind_of(authorization), address, per_minute)
            raise error

    def _note_failure(
        self, kind: CredentialKind, address: str | None, per_minute: int | None
    ) -> None:
        # Who sends nothing guesses nothing.
        wait_s = None
        if per_minute is not None and kind is not CredentialKind.NONE:
            wait_s = self._failures.add(network_of(address), per_minute)
        self._metrics.sign_in_failed(kind, limited=wait_s is not None)
        if wait_s is None:
            return
        if self._failures.is_news(network_of(address)):
            logger.warning(
                "more than %d sign-ins a minute fail from one address: somebody guesses, or a "
                "program has a credential that ended",
                per_minute,
                extra={
                    "action": "sign_ins_limited",
                    "client_address": address,
                    "credential": kind.value,
                },
            )
        raise TooManyFailedSignIns(retry_after_s=wait_s)


class _Failures:
    """How many failures each network has had, as a bucket that runs empty within a minute."""

    def __init__(self, networks: int, clock: Callable[[], float]) -> None:
        self._most = networks
        self._clock = clock
        # When the bucket of a network will be empty, and when it was last told of.
        self._empty_at: OrderedDict[str, float] = OrderedDict()
        self._told_at: dict[str, float] = {}

    def add(self, network: str, per_minute: int) -> float | None:
        """Add a failure. Where there is no room, return the seconds until there is."""
        now = self._clock()
        each_s = _MINUTE_S / per_minute
        empty_at = max(now, self._empty_at.get(network, now)) + each_s
        if empty_at - now > _MINUTE_S + _ROUNDING_S:
            self._empty_at.move_to_end(network)
            return empty_at - now - _MINUTE_S
        self._empty_at[network] = empty_at
        self._empty_at.move_to_end(network)
        if len(self._empty_at) > self._most:
            dropped, _ = self._empty_at.popitem(last=False)
            self._told_at.pop(dropped, None)
        return None

    def is_news(self, network: str) -> bool:
        """Tell whether nobody was told of `network` in the last minute, and note that now."""
        now = self._clock()
        if now - self._told_at.get(network, -_MINUTE_S) < _MINUTE_S:
            return False
        self._told_at[network] = now
        return True


def kind_of(authorization: str | None) -> CredentialKind:
    """Return what an Authorization header value holds, by its looks."""
    if authorization is None or not authorization.strip():
        return CredentialKind.NONE
    credential = authorization.strip().partition(" ")[2].strip()
    return CredentialKind.API_KEY if credential.startswith(KEY_START) else CredentialKind.TOKEN


def network_of(address: str | None) -> str:
    """Return what failures are counted for: an IPv4 address, or the /64 of an IPv6 address."""
    try:
        parsed = ipaddress.ip_address(address or "")
    except ValueError:
        return _UNKNOWN
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed.packed, _IPV6_PREFIX), strict=False))
