"""API keys: their form, and the table that keeps them.

A key is `cai-<prefix>-<secret>`, in base62. The prefix is public and finds the row; of the whole
key only the SHA-256 is stored. A fast hash is right here: 43 random characters hold 256 bits.

A key that was rotated keeps its id. Its earlier secret becomes a row of its own that names the
key in `replaced_by` and is valid until it expires.
"""

from __future__ import annotations

import logging
import re
import secrets
import string
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import orjson
from pydantic import ValidationError

from serve_app.audit.act import Actor, AuditAct
from serve_app.audit.log import AuditLog
from serve_app.config import Bodies, LimitPolicy
from serve_app.errors import InvalidRequest, NotFound
from serve_app.identity.digest import digest_of
from serve_app.identity.principal import Permission
from serve_app.records import new_id, utc_now
from serve_app.sql import named_queries

if TYPE_CHECKING:
    import asyncpg

    from serve_app.lazy_pool import Connection, LazyPool

logger = logging.getLogger(__name__)

KEY_START = "cai-"
MAX_NAME_CHARS = 200
MAX_NOTE_CHARS = 1000
MAX_OWNER_CHARS = 255
# So many secrets of one key may be valid beside the present one.
MOST_EARLIER = 5

_BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase
_PREFIX_CHARS = 12
_SECRET_CHARS = 43
_KEY_FORM = re.compile(
    rf"{KEY_START}([0-9A-Za-z]{{{_PREFIX_CHARS}}})-[0-9A-Za-z]{{{_SECRET_CHARS}}}"
)


def query(name: str) -> str:
    """Return one query of the keys."""
    return named_queries("serve_app.identity", "queries.sql")[name]


def generate_key() -> tuple[str, str, bytes]:
    """Return a new key in plain, its prefix and the SHA-256 (32 bytes) of the whole key."""
    prefix = _random_base62(_PREFIX_CHARS)
    plain = f"{KEY_START}{prefix}-{_random_base62(_SECRET_CHARS)}"
    return plain, prefix, digest_of(plain)


def prefix_of(plain: str) -> str | None:
    """Return the prefix of a key, or None if it does not have the form of one."""
    match = _KEY_FORM.fullmatch(plain)
    return match[1] if match else None


def _random_base62(length: int) -> str:
    return "".join(secrets.choice(_BASE62) for _ in range(length))


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyTerms:
    """What a key is for and what it may do. `models` None allows every model.

    `bodies` is the most that is kept of what is asked with it; None leaves that to the policy.
    """

    name: str
    note: str | None = None
    permissions: frozenset[Permission] = frozenset({Permission.USER})
    models: frozenset[str] | None = None
    limits: LimitPolicy | None = None
    bodies: Bodies | None = None
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """One row of `comp_ai.api_keys`.

    `replaced_by` is set for an earlier secret of another key. `earlier` holds those of this key
    that are still valid, where they were asked for.
    """

    id: uuid.UUID
    prefix: str
    secret_hash: bytes = field(repr=False)
    owner: str
    terms: KeyTerms
    created_at: datetime
    created_by: str | None
    revoked_at: datetime | None
    last_used_at: datetime | None
    rotated_at: datetime | None = None
    replaced_by: uuid.UUID | None = None
    earlier: tuple[ApiKey, ...] = ()

    @property
    def key_id(self) -> uuid.UUID:
        """The id of the key, whichever of its secrets this is."""
        return self.replaced_by or self.id

    def is_valid(self, at: datetime) -> bool:
        """Tell whether the key is neither revoked nor expired."""
        return self.status(at) == "valid"

    def status(self, at: datetime) -> str:
        """Return valid, expired or revoked."""
        if self.revoked_at is not None:
            return "revoked"
        expires_at = self.terms.expires_at
        return "valid" if expires_at is None or at < expires_at else "expired"

    def to_openai(self) -> dict[str, Any]:
        """Return what may be shown of the key, in the form of OpenAI's objects."""
        terms = self.terms
        return {
            "id": str(self.id),
            "object": "api_key",
            "name": terms.name,
            "note": terms.note,
            "owner": self.owner,
            "prefix": self.prefix,
            "status": self.status(utc_now()),
            "permissions": sorted(terms.permissions),
            "models": None if terms.models is None else sorted(terms.models),
            "limits": None if terms.limits is None else _dump(terms.limits),
            "bodies": terms.bodies,
            "created_at": _seconds(self.created_at),
            "created_by": self.created_by,
            "expires_at": _seconds(terms.expires_at),
            "rotated_at": _seconds(self.rotated_at),
            "revoked_at": _seconds(self.revoked_at),
            "last_used_at": _seconds(self.last_used_at),
            "earlier_secrets": [
                {
                    "prefix": secret.prefix,
                    "expires_at": _seconds(secret.terms.expires_at),
                    "last_used_at": _seconds(secret.last_used_at),
                }
                for secret in self.earlier
            ],
        }


# Raises where the key, as it would be, is more than somebody may make.
Check = Callable[[KeyTerms], None]


def allow_anything(_terms: KeyTerms) -> None:
    """Allow every key."""


class ApiKeyStore:
    """The table of API keys.

    Every method raises what `pool` raises without PostgreSQL. Those that change something write
    the row of the audit log in the same transaction. `owner` None means whoever it is.
    """

    def __init__(self, pool: LazyPool) -> None:
        self._pool = pool
        self._audit = AuditLog()

    async def create(
        self,
        terms: KeyTerms,
        *,
        owner: str,
        by: Actor,
        most: int | None = None,
        max_life: timedelta | None = None,
    ) -> tuple[str, ApiKey]:
        """Make a key; return it in plain, for the only time, and its row.

        Args:
            most: how many valid keys the owner may have.
            max_life: how long it may live.

        Raises:
            InvalidRequest: terms or an owner that cannot be kept, or too many keys.
        """
        created_at = utc_now()
        _check_text("owner", owner, MAX_OWNER_CHARS)
        _check_terms(terms, created_at)
        if max_life is not None:
            _check_life(terms, created_at, max_life)
        plain, prefix, secret_hash = generate_key()
        async with self._pool.connection() as connection, connection.transaction():
            if most is not None:
                await _check_number(connection, owner, most)
            row = await connection.fetchrow(
                query("add"),
                new_id(),
                prefix,
                secret_hash,
                terms.name,
                terms.note,
                owner,
                *_scope(terms),
                created_at,
                by.id[:MAX_OWNER_CHARS],
                terms.expires_at,
            )
            assert row is not None
            key = _to_key(row)
            await self._note(connection, "key.create", by, None, key)
        return plain, key

    async def get(self, key_id: uuid.UUID, owner: str | None = None) -> ApiKey:
        """Return one key with its earlier secrets. Raises NotFound."""
        async with self._pool.connection() as connection:
            key = _found(await connection.fetchrow(query("get"), key_id, owner))
            return await _with_earlier(connection, key)

    async def list(
        self,
        owner: str | None = None,
        *,
        after: uuid.UUID | None = None,
        limit: int | None = None,
        newest_first: bool = False,
    ) -> Sequence[ApiKey]:
        """Return up to `limit` keys that come after the one of the id `after`."""
        name = "list_desc" if newest_first else "list_asc"
        async with self._pool.connection() as connection:
            rows = await connection.fetch(query(name), owner, after, limit)
            keys = _readable(rows)
            earlier = await _earlier(connection, [key.id for key in keys])
        return [replace(key, earlier=tuple(earlier.get(key.id, ()))) for key in keys]

    async def change(
        self,
        key_id: uuid.UUID,
        changes: Mapping[str, Any],
        *,
        by: Actor,
        owner: str | None = None,
        check: Check = allow_anything,
        max_life: timedelta | None = None,
    ) -> ApiKey:
        """Change the terms of a key that are named in `changes`.

        Args:
            max_life: how long after its secret was made a new expiry may be.

        Raises:
            NotFound: the owner has no key of that id.
            InvalidRequest: terms that cannot be kept, or the key is revoked.
        """
        async with self._pool.connection() as connection, connection.transaction():
            before = await _locked(connection, key_id, owner)
            terms = replace(before.terms, **changes)
            _refuse_revoked(before)
            # An expiry that is past already and is not touched stays.
            _check_terms(terms, utc_now() if "expires_at" in changes else None)
            if max_life is not None and "expires_at" in changes:
                _check_life(terms, before.rotated_at or before.created_at, max_life)
            check(terms)
            row = await connection.fetchrow(
                query("change"), key_id, terms.name, terms.note, *_scope(terms), terms.expires_at
            )
            await connection.execute(
                query("change_earlier"), key_id, *_scope(terms), terms.expires_at
            )
            key = await _with_earlier(connection, _found(row))
            await self._note(connection, "key.update", by, before, key)
        return key

    async def rotate(
        self,
        key_id: uuid.UUID,
        *,
        overlap: timedelta,
        by: Actor,
        owner: str | None = None,
        check: Check = allow_anything,
        max_life: timedelta | None = None,
    ) -> tuple[str, ApiKey]:
        """Give a key a new secret; return it in plain, for the only time, and its row.

        Its secrets until now stay valid for `overlap` at most, and not past its expiry. With
        `max_life` the key expires no later than that from now.

        Raises:
            NotFound: the owner has no key of that id.
            InvalidRequest: the key is not valid, or too many of its secrets are.
        """
        plain, prefix, secret_hash = generate_key()
        async with self._pool.connection() as connection, connection.transaction():
            before = await _locked(connection, key_id, owner)
            now = utc_now()
            _refuse_revoked(before)
            if not before.is_valid(now):
                raise InvalidRequest("The key has expired. Make a new one.", param="key_id")
            check(before.terms)
            await connection.execute(query("end_earlier"), key_id, now + overlap)
            await connection.execute(query("drop_ended"), key_id, now)
            latest = None if max_life is None else now + max_life
            row = await connection.fetchrow(
                query("renew"), key_id, prefix, secret_hash, now, latest
            )
            if overlap:
                await _keep_earlier(connection, before, now + overlap)
            key = await _with_earlier(connection, _found(row))
            if len(key.earlier) > MOST_EARLIER:
                message = (
                    f"{MOST_EARLIER} earlier secrets of the key are still valid. "
                    "Wait for one to expire, or end them all with `overlap_s` 0."
                )
                raise InvalidRequest(message, param="overlap_s")
            await self._note(connection, "key.rotate", by, before, key)
        return plain, key

    async def revoke(self, key_id: uuid.UUID, *, by: Actor, owner: str | None = None) -> ApiKey:
        """Revoke a key with all its secrets, for good. Safe to repeat.

        Raises:
            NotFound: the owner has no key of that id.
        """
        async with self._pool.connection() as connection, connection.transaction():
            before = await _locked(connection, key_id, owner)
            if before.revoked_at is not None:
                return before
            await connection.execute(query("revoke"), key_id, utc_now())
            key = _found(await connection.fetchrow(query("get"), key_id, owner))
            await self._note(connection, "key.revoke", by, before, key)
        return key

    async def find(self, prefixes: Collection[str]) -> dict[str, ApiKey]:
        """Return what has these prefixes, by prefix: revoked and expired keys too."""
        async with self._pool.connection() as connection:
            rows = await connection.fetch(query("find"), list(prefixes))
        return {key.prefix: key for key in _readable(rows)}

    async def mark_used(self, times: dict[uuid.UUID, datetime]) -> None:
        """Write when keys were last used; a later time that is there already stays."""
        async with self._pool.connection() as connection:
            await connection.execute(query("mark_used"), list(times), list(times.values()))

    async def _note(
        self, connection: Connection, action: str, by: Actor, before: ApiKey | None, after: ApiKey
    ) -> None:
        act = AuditAct(
            actor=by,
            action=action,
            target=str(after.id),
            before=None if before is None else before.to_openai(),
            after=after.to_openai(),
        )
        await self._audit.append(connection, act)


async def _check_number(connection: Connection, owner: str, most: int) -> None:
    await connection.execute(query("lock_owner"), owner)
    if await connection.fetchval(query("count_valid"), owner) >= most:
        raise InvalidRequest(f"You have {most} valid keys. Revoke one that you no longer need.")


async def _locked(connection: Connection, key_id: uuid.UUID, owner: str | None) -> ApiKey:
    key = _found(await connection.fetchrow(query("lock"), key_id, owner))
    return await _with_earlier(connection, key)


def _found(row: asyncpg.Record | None) -> ApiKey:
    if row is None:
        raise NotFound("There is no key of that id among those that you may see.", param="key_id")
    return _to_key(row)


def _refuse_revoked(key: ApiKey) -> None:
    if key.revoked_at is not None:
        raise InvalidRequest("The key is revoked, for good. Make a new one.", param="key_id")


async def _keep_earlier(connection: Connection, key: ApiKey, expires_at: datetime) -> None:
    await connection.execute(
        query("keep_earlier"),
        new_id(),
        key.prefix,
        key.secret_hash,
        expires_at,
        key.last_used_at,
        key.id,
    )


async def _with_earlier(connection: Connection, key: ApiKey) -> ApiKey:
    earlier = await _earlier(connection, [key.id])
    return replace(key, earlier=tuple(earlier.get(key.id, ())))


async def _earlier(
    connection: Connection, ids: Collection[uuid.UUID]
) -> dict[uuid.UUID, list[ApiKey]]:
    found: dict[uuid.UUID, list[ApiKey]] = {}
    for secret in _readable(await connection.fetch(query("earlier_secrets"), ids)):
        found.setdefault(secret.key_id, []).append(secret)
    return found


def _check_terms(terms: KeyTerms, now: datetime | None) -> None:
    _check_text("name", terms.name, MAX_NAME_CHARS)
    if terms.note is not None:
        _check_text("note", terms.note, MAX_NOTE_CHARS)
    if not terms.permissions:
        raise InvalidRequest("An API key needs at least one permission.", param="permissions")
    if terms.models is not None and not terms.models:
        message = "Name at least one model, or leave `models` out for every model."
        raise InvalidRequest(message, param="models")
    for model in terms.models or ():
        _check_text("models", model, MAX_NAME_CHARS)
    expires_at = terms.expires_at
    if now is None or expires_at is None:
        return
    if expires_at.tzinfo is None or expires_at <= now:
        raise InvalidRequest("The expiry must be a future time with a zone.", param="expires_at")


def _check_life(terms: KeyTerms, made_at: datetime, max_life: timedelta) -> None:
    latest = made_at + max_life
    if terms.expires_at is None or terms.expires_at > latest:
        raise InvalidRequest(
            f"A secret may live {max_life.total_seconds():.0f} s here: name an expiry of "
            f"{int(latest.timestamp())} or earlier, or rotate the key first.",
            param="expires_at",
        )


def _check_text(param: str, value: str, max_chars: int) -> None:
    if not 0 < len(value) <= max_chars or not value.isprintable():
        raise InvalidRequest(f"Give 1 to {max_chars} printable characters.", param=param)


def _scope(terms: KeyTerms) -> tuple[list[str], list[str] | None, str | None, str | None]:
    """Return permissions, models, limits and bodies as the table keeps them."""
    limits = None if terms.limits is None else orjson.dumps(_dump(terms.limits)).decode()
    models = None if terms.models is None else sorted(terms.models)
    return sorted(terms.permissions), models, limits, terms.bodies


def _dump(limits: LimitPolicy) -> dict[str, Any]:
    return limits.model_dump(mode="json", exclude_none=True)


def _seconds(at: datetime | None) -> int | None:
    return None if at is None else int(at.timestamp())


def _readable(rows: Sequence[asyncpg.Record]) -> list[ApiKey]:
    """Return the keys of rows. One that cannot be read is none, so that it opens nothing."""
    keys = []
    for row in rows:
        try:
            keys.append(_to_key(row))
        except (ValidationError, orjson.JSONDecodeError):
            logger.error(
                "the limits of the API key %s cannot be read, so it is refused",
                row["id"],
                extra={"action": "api_key_unreadable"},
            )
    return keys


def _to_key(row: asyncpg.Record) -> ApiKey:
    replaced_by = row["replaced_by"]
    return ApiKey(
        # asyncpg has a UUID class of its own, which JSON writers do not take.
        id=uuid.UUID(int=row["id"].int),
        prefix=row["prefix"],
        secret_hash=row["secret_hash"],
        owner=row["owner"],
        terms=_to_terms(row),
        created_at=row["created_at"],
        created_by=row["created_by"],
        revoked_at=row["revoked_at"],
        last_used_at=row["last_used_at"],
        rotated_at=row["rotated_at"],
        replaced_by=None if replaced_by is None else uuid.UUID(int=replaced_by.int),
    )


def _to_terms(row: asyncpg.Record) -> KeyTerms:
    known = {str(permission): permission for permission in Permission}
    limits = row["limits"]
    return KeyTerms(
        name=row["name"] or "",
        note=row["note"],
        # A permission that a newer release wrote means nothing to this one.
        permissions=frozenset(known[text] for text in row["permissions"] if text in known),
        models=None if row["models"] is None else frozenset(row["models"]),
        limits=None if limits is None else LimitPolicy.model_validate(orjson.loads(limits)),
        bodies=_to_bodies(row["bodies"]),
        expires_at=row["expires_at"],
    )


def _to_bodies(word: str | None) -> Bodies | None:
    # A word that a newer release wrote is obeyed in the strictest way.
    return None if word is None else Bodies(word) if word in set(Bodies) else Bodies.NONE
