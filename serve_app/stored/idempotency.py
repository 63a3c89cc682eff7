"""Idempotency keys: a request that is sent again is answered, not generated, again.

After https://datatracker.ietf.org/doc/html/draft-ietf-httpapi-idempotency-key-header-07, with
Stripe's limits on keys and its `idempotent-replayed` header
(https://docs.stripe.com/api/idempotent_requests). Unlike Stripe's, a failure is not kept: the
retry runs again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serve_app.accounts.sealing.cells import Cell, cell
from serve_app.accounts.sealing.places import answer_place
from serve_app.background import stop_tasks
from serve_app.config import IdempotencyConfig
from serve_app.errors import (
    AnswerNotKept,
    IdempotencyConflict,
    IdempotencyMismatch,
    InvalidRequest,
    RequestError,
)
from serve_app.lazy_pool import Connection, LazyPool
from serve_app.records import new_id
from serve_app.sql import named_queries
from serve_app.stored.vault import Vault

logger = logging.getLogger(__name__)

HEADER = "idempotency-key"
REPLAYED = {"idempotent-replayed": "true"}

MAX_KEY_CHARS = 255
# The release before writes `answered`, with the answer in the clear, and reads it; `sealed` is to
# it a request under way.
_ANSWERED, _SEALED, _NOT_KEPT = "answered", "sealed", "not_kept"
# A string of RFC 9651 §3.3.3: what the draft asks for. Most clients send the bare key.
_QUOTED = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\])*)"')
_ESCAPED = re.compile(r'\\(["\\])')
_BARE = re.compile(r"[ -~]+")
_MOST_RETRY_AFTER_S = 30.0
_RENEWALS = 3  # in the time of one claim: two may be lost
_TRIES = 3
_KEEP_TIMEOUT_S = 3.0


def read_key(values: Sequence[str]) -> str | None:
    """Return the key that the header's values name, or None where there is none.

    Raises:
        InvalidRequest: it is empty, too long, not printable ASCII, or there are several.
    """
    if not values:
        return None
    quoted = _QUOTED.fullmatch(values[0])
    key = _ESCAPED.sub(r"\1", quoted[1]) if quoted else values[0]
    if len(values) > 1 or len(key) > MAX_KEY_CHARS or not _BARE.fullmatch(key):
        raise InvalidRequest(
            f"Idempotency-Key must be one key of 1 to {MAX_KEY_CHARS} printable ASCII characters.",
            param="Idempotency-Key",
        )
    return key


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyUse:
    """A key, whose it is, and what is asked under it."""

    principal_id: str
    key: str
    route: str
    fingerprint: bytes

    @classmethod
    def of(cls, principal_id: str, key: str, route: str, body: bytes) -> KeyUse:
        """Return the use of `key` for `body`."""
        return cls(
            principal_id=principal_id,
            key=key,
            route=route,
            fingerprint=hashlib.sha256(body).digest(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredAnswer:
    """An answer as it went out; of a stream all its bytes."""

    status: int
    media_type: str
    body: bytes


def judge(use: KeyUse, row: Mapping[str, Any]) -> Cell:
    """Return the answer that `row` holds for `use` of its key, as it is stored.

    Raises:
        IdempotencyMismatch: the key was used for something else.
        IdempotencyConflict: the request is under way; carries when to try again.
        AnswerNotKept: the answer was too long to keep.
    """
    if (row["route"], row["fingerprint"]) != (use.route, use.fingerprint):
        raise IdempotencyMismatch
    if row["state"] == _NOT_KEPT:
        raise AnswerNotKept
    if row["state"] not in (_ANSWERED, _SEALED):
        # How long it will take is not known. Waiting as long again as it took until now asks
        # few times, and never waits for more than twice what was needed.
        raise IdempotencyConflict(retry_after_s=min(row["age_s"], _MOST_RETRY_AFTER_S))
    return stored_answer(row, use.principal_id, use.key)


def stored_answer(row: Mapping[str, Any], principal_id: str, key: str) -> Cell:
    """Return the answer in a row, as it is stored."""
    # The release before leaves what was sealed there under an earlier use of the key.
    if row["state"] == _ANSWERED:
        return bytes(row["answer"])
    return cell(row, answer_place(principal_id, key)) if row["state"] == _SEALED else None


class Claim:
    """One request's hold on a key: taken, renewed while it is under way, and ended once.

    A claim that nobody renews, because its gateway died, ends by itself after `claim_s`.
    """

    def __init__(
        self, database: LazyPool, vault: Vault, config: IdempotencyConfig, use: KeyUse
    ) -> None:
        self._database = database
        self._vault = vault
        self._config = config
        self._use = use
        self._owner: uuid.UUID = new_id()
        self._held = False
        self._renewing: asyncio.Task[None] | None = None

    async def take(self) -> StoredAnswer | None:
        """Take the key, and return None; or return the answer that is kept under it.

        Raises:
            IdempotencyConflict, IdempotencyMismatch, AnswerNotKept: see `judge`.
            StoreUnavailable: PostgreSQL or the key of the answer is away.
        """
        # Noted before the statement goes out: if this dies in there, the claim is given back.
        self._held = True
        for _ in range(_TRIES):
            async with self._database.connection() as connection:
                if await connection.fetchval(*self._insert()):
                    self._renewing = asyncio.create_task(self._renew(), name="renew-claim")
                    return None
                row = await connection.fetchrow(_query("look"), *self._name())
                if row is not None:
                    self._held = False
                    return await self._replayed(connection, dict(row))
            # Given back between the two statements.
        raise IdempotencyConflict(retry_after_s=1)

    async def keep(self, answer: StoredAnswer) -> None:
        """Keep `answer` for who asks again; where PostgreSQL is away the claim just ends.

        Takes `_KEEP_TIMEOUT_S` at most: the client waits for its last byte.
        """
        await stop_tasks(self._renewing)
        if not self._held:
            return
        self._held = False
        kept = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_KEEP_TIMEOUT_S):
                kept = await self._keep(answer)
        if not kept:
            logger.warning(
                "an answer was not kept under its idempotency key",
                extra={"action": "idempotency_answer_lost"},
            )

    async def release(self) -> None:
        """Give the key back, so that the next request with it runs. Safe to repeat."""
        await stop_tasks(self._renewing)
        if not self._held:
            return
        self._held = False
        # Where PostgreSQL is away, the claim ends by itself.
        with contextlib.suppress(RequestError):
            async with self._database.connection() as connection:
                await connection.execute(_query("release"), *self._name(), self._owner)

    async def _keep(self, answer: StoredAnswer) -> bool:
        while True:
            try:
                async with self._database.connection() as connection, connection.transaction():
                    # False where the claim had ended and is another request's now.
                    return bool(await connection.fetchval(*await self._update(connection, answer)))
            except RequestError as error:
                # A connection that was cut is not yet a server that is away.
                await asyncio.sleep(error.retry_after_s or 1.0)

    async def _replayed(self, connection: Connection, row: dict[str, Any]) -> StoredAnswer:
        [body] = await self._vault.open(connection, [judge(self._use, row)])
        if body is None:
            raise AnswerNotKept  # its key was destroyed
        return StoredAnswer(status=row["status"], media_type=row["media_type"], body=body)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._config.claim_s / _RENEWALS)
            # It is tried again: the claim outlasts a short absence.
            with contextlib.suppress(RequestError):
                async with self._database.connection() as connection:
                    await connection.execute(
                        _query("renew"), *self._name(), self._owner, self._config.claim_s
                    )

    def _name(self) -> tuple[str, str]:
        return self._use.principal_id, self._use.key

    def _insert(self) -> tuple[Any, ...]:
        use, config = self._use, self._config
        more = (use.route, use.fingerprint, self._owner, config.claim_s, config.keep_s)
        return _query("claim"), *self._name(), *more

    async def _update(self, connection: Connection, answer: StoredAnswer) -> tuple[Any, ...]:
        state: tuple[Any, ...] = (_NOT_KEPT, answer.status, answer.media_type, None, None)
        if len(answer.body) <= self._config.max_stored_bytes:
            text = answer_place(*self._name()), answer.body
            [one] = await self._vault.seal(connection, self._use.principal_id, [text])
            state = (_SEALED, answer.status, answer.media_type, one.key_id, one.sealed)
        return _query("answered"), *self._name(), self._owner, *state, self._config.keep_s


def _query(name: str) -> str:
    return named_queries("serve_app.stored", "idempotency.sql")[name]
