"""Verification of API keys, with little work for PostgreSQL and through its outages.

An answer of the table is believed for a second, and for as long as it is certain that no notice
of a change was missed (`key_changes`). All lookups that wait are asked in one query, and only one
query runs at a time, so a flood of made-up keys cannot flood the database.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from serve_app.errors import AuthenticationFailed, IdentityUnavailable
from serve_app.identity.api_keys import ApiKey, ApiKeyStore, prefix_of
from serve_app.identity.digest import digest_of
from serve_app.identity.key_changes import KeyChanges, NoKeyChanges, Watch
from serve_app.identity.lru import Lru
from serve_app.identity.principal import Permission, Principal
from serve_app.records import PrincipalKind, utc_now

logger = logging.getLogger(__name__)

BOOTSTRAP_ID = "bootstrap"

_BATCH = 500
_MAX_WAITING = 5_000
# One answer for unknown, wrong, expired and revoked: it tells nothing of which keys exist.
_REFUSED = "The API key is not valid: unknown, expired or revoked."
_NO_KEY_HASH = bytes(32)


@dataclass(frozen=True, slots=True)
class _Known:
    """What the table said of a prefix, and when it was asked (monotonic seconds).

    `watch` is kept since before it was asked, so that a change since then would have been heard.
    """

    key: ApiKey | None
    asked_at: float
    watch: Watch | None

    @property
    def true_at(self) -> float:
        """Until when it is known to have been so (monotonic seconds)."""
        if self.watch is None:
            return self.asked_at
        return max(self.asked_at, self.watch.confirmed_at)


class ApiKeyVerifier:
    """Turns API keys into principals.

    Args:
        store: the table of keys.
        changes: tells which keys changed.
        bootstrap_key: one key with every permission, checked without PostgreSQL.
        fresh_s: how old what is known of a key may be, and so how late a revocation acts.
        recheck_s: how long it is believed without a look at the table, though no change is heard.
        stale_s: how old it may be while PostgreSQL cannot be asked.
        flush_s: how often the times of last use are written.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        store: ApiKeyStore,
        changes: KeyChanges | None = None,
        *,
        bootstrap_key: str | None = None,
        fresh_s: float = 1.0,
        recheck_s: float = 300.0,
        stale_s: float = 300.0,
        flush_s: float = 30.0,
        cache_size: int = 10_000,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        self._store = store
        self._changes = changes or NoKeyChanges()
        self._bootstrap_hash = digest_of(bootstrap_key) if bootstrap_key else None
        self._fresh_s = fresh_s
        self._recheck_s = recheck_s
        self._stale_s = stale_s
        self._flush_s = flush_s
        self._clock = clock
        self._now = now
        # Apart, so that a flood of made-up keys drives out no real one.
        self._known: Lru[str, _Known] = Lru(cache_size)
        self._unknown: Lru[str, _Known] = Lru(cache_size)
        self._changed = 0
        self._waiting: dict[str, asyncio.Future[ApiKey | None]] = {}
        self._asker: asyncio.Task[None] | None = None
        self._used: dict[uuid.UUID, datetime] = {}
        self._flusher: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to listen and to write the times of last use; PostgreSQL may be away."""
        self._changes.start(self._forget)
        if self._flusher is None:
            self._flusher = asyncio.create_task(self._flush_forever(), name="api-key-last-used")

    async def close(self) -> None:
        """Stop the background work and write the last times of use."""
        tasks = [task for task in (self._flusher, self._asker) if task is not None]
        self._flusher = None
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self._changes.close()
        await self.flush()

    def is_bootstrap(self, plain: str) -> bool:
        """Tell in constant time whether `plain` is the bootstrap key."""
        expected = self._bootstrap_hash
        return expected is not None and hmac.compare_digest(digest_of(plain), expected)

    async def verify(self, plain: str) -> Principal:
        """Return the principal that the key names.

        Raises:
            AuthenticationFailed: no such key, or it is expired or revoked.
            IdentityUnavailable: PostgreSQL cannot be asked and no recent answer is kept.
        """
        if self.is_bootstrap(plain):
            return _BOOTSTRAP
        prefix = prefix_of(plain)
        if prefix is None:
            raise AuthenticationFailed(_REFUSED)
        key = await self._find(prefix)
        # Compared also where there is no key, so that the answer takes the same time.
        same = hmac.compare_digest(digest_of(plain), key.secret_hash if key else _NO_KEY_HASH)
        now = self._now()
        if key is None or not same or not key.is_valid(now):
            raise AuthenticationFailed(_REFUSED)
        self._used[key.id] = now
        return _to_principal(key)

    async def flush(self) -> None:
        """Write the times of last use now; they are kept for later where that fails."""
        used, self._used = self._used, {}
        if not used:
            return
        try:
            await self._store.mark_used(used)
        except IdentityUnavailable:
            self._used = used | self._used
        except asyncio.CancelledError:
            # Stopped for the last flush, which writes these too.
            self._used = used | self._used
            raise

    async def _flush_forever(self) -> None:
        while True:
            await asyncio.sleep(self._flush_s)
            await self.flush()

    def _forget(self, prefix: str | None) -> None:
        """Drop what is known of `prefix`, or of every key."""
        self._changed += 1
        for entries in (self._known, self._unknown):
            if prefix is None:
                entries.clear()
            else:
                entries.pop(prefix)

    async def _find(self, prefix: str) -> ApiKey | None:
        known = self._remembered(prefix)
        if known is not None and self._is_fresh(known):
            return known.key
        try:
            return await self._ask(prefix)
        except IdentityUnavailable:
            stale = self._known.get(prefix)
            if stale is None or self._clock() - stale.true_at > self._stale_s:
                raise
            return stale.key

    def _remembered(self, prefix: str) -> _Known | None:
        return self._known.get(prefix) or self._unknown.get(prefix)

    def _is_fresh(self, known: _Known) -> bool:
        now = self._clock()
        return now - known.true_at <= self._fresh_s and now - known.asked_at <= self._recheck_s

    async def _ask(self, prefix: str) -> ApiKey | None:
        """Return what the table says of `prefix`; everyone who waits shares the answer."""
        waiting = self._waiting.get(prefix)
        if waiting is None:
            if len(self._waiting) >= _MAX_WAITING:
                raise IdentityUnavailable(retry_after_s=1.0)
            waiting = self._waiting[prefix] = asyncio.get_running_loop().create_future()
            # Someone may have gone away and nobody look at the error any more.
            waiting.add_done_callback(_retrieve)
        if self._asker is None or self._asker.done():
            self._asker = asyncio.create_task(self._ask_all(), name="api-key-lookup")
            self._asker.add_done_callback(self._forget_asker)
        return await asyncio.shield(waiting)

    async def _ask_all(self) -> None:
        while self._waiting:
            prefixes = list(self._waiting)[:_BATCH]
            asked_at, watch, changed = self._clock(), self._changes.watch, self._changed
            try:
                keys = await self._store.find(prefixes)
            except IdentityUnavailable as error:
                self._fail(prefixes, error)
                continue
            if changed != self._changed or watch is not self._changes.watch:
                # One of them may have changed after it was read; its notice is spent.
                watch = None
            for prefix in prefixes:
                key = keys.get(prefix)
                self._remember(prefix, _Known(key, asked_at, watch))
                self._answer(prefix, key)

    def _remember(self, prefix: str, known: _Known) -> None:
        # A row that was deleted must not live on as one, nor a new one as none.
        kept, dropped = (
            (self._unknown, self._known) if known.key is None else (self._known, self._unknown)
        )
        dropped.pop(prefix)
        kept.put(prefix, known)

    def _answer(self, prefix: str, key: ApiKey | None) -> None:
        waiting = self._waiting.pop(prefix)
        if not waiting.done():
            waiting.set_result(key)

    def _fail(self, prefixes: list[str], error: IdentityUnavailable) -> None:
        for prefix in prefixes:
            waiting = self._waiting.pop(prefix)
            if not waiting.done():
                waiting.set_exception(error)

    def _forget_asker(self, task: asyncio.Task[None]) -> None:
        """Release those who still wait, however the task ended."""
        if self._asker is not task:
            return  # a later task asks for them
        self._asker = None
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error(
                "looking up API keys failed: %s",
                type(error).__name__,
                extra={"action": "api_key_lookup_died"},
            )
        self._fail(list(self._waiting), IdentityUnavailable())


_BOOTSTRAP = Principal(
    id=BOOTSTRAP_ID,
    kind=PrincipalKind.API_KEY,
    permissions=frozenset({Permission.ADMIN}),
    roles=frozenset({Permission.ADMIN.value}),
)


def _to_principal(key: ApiKey) -> Principal:
    terms = key.terms
    return Principal(
        id=key.owner,
        kind=PrincipalKind.API_KEY,
        permissions=terms.permissions,
        models=terms.models,
        api_key_id=key.key_id,
        # A key has no token to name roles; what it may do is what it is.
        roles=frozenset(permission.value for permission in terms.permissions),
        limits=terms.limits,
        bodies=terms.bodies,
    )


def _retrieve(future: asyncio.Future[ApiKey | None]) -> None:
    if not future.cancelled():
        future.exception()
