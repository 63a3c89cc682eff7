"""API keys: their form, and the table that keeps them.

A key is `cai-<prefix>-<secret>`, in base62. The prefix is public and finds the row; of the whole
key only the SHA-256 is stored. A fast hash is right here: 43 random characters hold 256 bits.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import string
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING

from serve_app.errors import InvalidRequest
from serve_app.identity.principal import Permission
from serve_app.records import new_id, utc_now

if TYPE_CHECKING:
    import asyncpg

    from serve_app.lazy_pool import LazyPool

KEY_START = "cai-"

_BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase
_PREFIX_CHARS = 12
_SECRET_CHARS = 43
_KEY_FORM = re.compile(
    rf"{KEY_START}([0-9A-Za-z]{{{_PREFIX_CHARS}}})-[0-9A-Za-z]{{{_SECRET_CHARS}}}"
)
_MAX_NAME_CHARS = 200
_MAX_OWNER_CHARS = 255

_COLUMNS = """id, prefix, secret_hash, name, owner, permissions, models,
    created_at, created_by, expires_at, revoked_at, last_used_at"""

# _COLUMNS is the only text put into these, and it is a constant.
INSERT_KEY = f"""
INSERT INTO comp_ai.api_keys
    (id, prefix, secret_hash, name, owner, permissions, models, created_at, created_by, expires_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
RETURNING {_COLUMNS}
"""  # noqa: S608
LIST_KEYS = f"""
SELECT {_COLUMNS} FROM comp_ai.api_keys
WHERE $1::text IS NULL OR owner = $1
ORDER BY created_at, id
"""  # noqa: S608
FIND_KEYS = f"SELECT {_COLUMNS} FROM comp_ai.api_keys WHERE prefix = ANY($1::text[])"  # noqa: S608
REVOKE_KEY = """
UPDATE comp_ai.api_keys SET revoked_at = coalesce(revoked_at, $2)
WHERE id = $1
RETURNING id
"""
# Several gateways write the same rows: taking the locks in one order keeps them from deadlock.
MARK_USED = """
WITH used AS (
    SELECT keys.id, marks.at
    FROM comp_ai.api_keys AS keys
    JOIN unnest($1::uuid[], $2::timestamptz[]) AS marks (id, at) USING (id)
    WHERE keys.last_used_at IS NULL OR keys.last_used_at < marks.at
    ORDER BY keys.id
    FOR NO KEY UPDATE OF keys
)
UPDATE comp_ai.api_keys AS keys SET last_used_at = used.at
FROM used WHERE keys.id = used.id
"""


def generate_key() -> tuple[str, str, bytes]:
    """Return a new key in plain, its prefix and the SHA-256 (32 bytes) of the whole key."""
    prefix = _random_base62(_PREFIX_CHARS)
    plain = f"{KEY_START}{prefix}-{_random_base62(_SECRET_CHARS)}"
    return plain, prefix, hash_key(plain)


def hash_key(plain: str) -> bytes:
    """Return the SHA-256 (32 bytes) of a whole key."""
    return hashlib.sha256(plain.encode("utf-8", "surrogateescape")).digest()


def prefix_of(plain: str) -> str | None:
    """Return the prefix of a key, or None if it does not have the form of one."""
    match = _KEY_FORM.fullmatch(plain)
    return match[1] if match else None


def _random_base62(length: int) -> str:
    return "".join(secrets.choice(_BASE62) for _ in range(length))


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """One row of `comp_ai.api_keys`. `models` None allows every model."""

    id: uuid.UUID
    prefix: str
    secret_hash: bytes = field(repr=False)
    name: str | None
    owner: str
    permissions: frozenset[Permission]
    models: frozenset[str] | None
    created_at: datetime
    created_by: str | None
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None

    def is_valid(self, at: datetime) -> bool:
        """Tell whether the key is neither revoked nor expired."""
        return self.revoked_at is None and (self.expires_at is None or at < self.expires_at)


class ApiKeyStore:
    """The table of API keys. Every method raises IdentityUnavailable without PostgreSQL."""

    def __init__(self, pool: LazyPool) -> None:
        self._pool = pool

    async def create(
        self,
        *,
        name: str,
        owner: str,
        created_by: str,
        permissions: Collection[Permission] = (Permission.USER,),
        models: Collection[str] | None = None,
        expires_at: datetime | None = None,
    ) -> tuple[str, ApiKey]:
        """Make a key; return it in plain, for the only time, and its row.

        Raises:
            InvalidRequest: a name or owner that cannot be kept, no permission, or a past expiry.
        """
        created_at = utc_now()
        _check_text("name", name, _MAX_NAME_CHARS)
        _check_text("owner", owner, _MAX_OWNER_CHARS)
        _check_text("created_by", created_by, _MAX_OWNER_CHARS)
        _check_scope(permissions, expires_at, created_at)
        plain, prefix, secret_hash = generate_key()
        async with self._pool.connection() as connection:
            row = await connection.fetchrow(
                INSERT_KEY,
                new_id(),
                prefix,
                secret_hash,
                name,
                owner,
                sorted(permissions),
                None if models is None else sorted(models),
                created_at,
                created_by,
                expires_at,
            )
        assert row is not None
        return plain, _to_key(row)

    async def list(self, owner: str | None = None) -> Sequence[ApiKey]:
        """Return all keys, or those of `owner`, the oldest first."""
        async with self._pool.connection() as connection:
            return [_to_key(row) for row in await connection.fetch(LIST_KEYS, owner)]

    async def revoke(self, key_id: uuid.UUID) -> bool:
        """Revoke a key for good; False if there is none. Safe to repeat."""
        async with self._pool.connection() as connection:
            return await connection.fetchval(REVOKE_KEY, key_id, utc_now()) is not None

    async def find(self, prefixes: Collection[str]) -> dict[str, ApiKey]:
        """Return the keys that have these prefixes, revoked and expired ones too, by prefix."""
        async with self._pool.connection() as connection:
            rows = await connection.fetch(FIND_KEYS, list(prefixes))
        return {row["prefix"]: _to_key(row) for row in rows}

    async def mark_used(self, times: dict[uuid.UUID, datetime]) -> None:
        """Write when keys were last used; a later time that is there already stays."""
        async with self._pool.connection() as connection:
            await connection.execute(MARK_USED, list(times), list(times.values()))


def _check_scope(
    permissions: Collection[Permission], expires_at: datetime | None, now: datetime
) -> None:
    if not permissions:
        raise InvalidRequest("An API key needs at least one permission.", param="permissions")
    if expires_at is not None and (expires_at.tzinfo is None or expires_at <= now):
        raise InvalidRequest("The expiry must be a future time with a zone.", param="expires_at")


def _check_text(param: str, value: str, max_chars: int) -> None:
    if not 0 < len(value) <= max_chars or not value.isprintable():
        raise InvalidRequest(f"Give 1 to {max_chars} printable characters.", param=param)


def _to_key(row: asyncpg.Record) -> ApiKey:
    known = {str(permission): permission for permission in Permission}
    return ApiKey(
        # asyncpg has a UUID class of its own, which JSON writers do not take.
        id=uuid.UUID(int=row["id"].int),
        prefix=row["prefix"],
        secret_hash=row["secret_hash"],
        name=row["name"],
        owner=row["owner"],
        # A permission that a newer release wrote means nothing to this one.
        permissions=frozenset(known[text] for text in row["permissions"] if text in known),
        models=None if row["models"] is None else frozenset(row["models"]),
        created_at=row["created_at"],
        created_by=row["created_by"],
        expires_at=row["expires_at"],
        revoked_at=row["revoked_at"],
        last_used_at=row["last_used_at"],
    )
