"""`comp-ai keys`: what the commands do and print."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import typer
from rich.console import Console
from rich.table import Column, Table

from serve_app.errors import ConfigError
from serve_app.identity.api_keys import ApiKey, ApiKeyStore
from serve_app.identity.principal import Permission
from serve_app.records import utc_now
from serve_app.settings import PostgresSettings
from serve_app.stack.accounts import key_store


async def create(
    settings: PostgresSettings,
    name: str,
    owner: str,
    permissions: Sequence[str],
    models: Sequence[str] | None,
    expires_in_days: float | None,
    as_json: bool,
) -> None:
    """Make a key and print it."""
    allowed = [_permission(text) for text in permissions]
    expires = None if expires_in_days is None else utc_now() + timedelta(days=expires_in_days)
    async with key_store(settings) as store:
        plain, key = await store.create(
            name=name,
            owner=owner,
            created_by="comp-ai keys create",
            permissions=allowed,
            models=models or None,
            expires_at=expires,
        )
    if as_json:
        typer.echo(json.dumps({"key": plain, **to_json(key)}))
        return
    typer.echo(plain)
    typer.echo("Keep it now: it is stored as a hash and is not shown again.", err=True)


async def show(settings: PostgresSettings, owner: str | None, as_json: bool) -> None:
    """Print the keys that there are."""
    async with key_store(settings) as store:
        keys = await store.list(owner)
    if as_json:
        typer.echo(json.dumps([to_json(key) for key in keys]))
        return
    # Whole: it is what `keys revoke` takes. The id is in the JSON.
    prefix = Column("prefix", no_wrap=True)
    table = Table(prefix, "name", "owner", "permissions", "models", "state", "last used")
    for key in keys:
        table.add_row(*_row(key))
    Console().print(table)


async def revoke(settings: PostgresSettings, text: str) -> int:
    """Revoke the key with this id or prefix; return the exit code."""
    async with key_store(settings) as store:
        key_id = await _find(store, text)
        done = key_id is not None and await store.revoke(key_id)
    typer.echo(f"revoked {key_id}" if done else f"there is no key {text}", err=not done)
    return 0 if done else 1


async def _find(store: ApiKeyStore, text: str) -> uuid.UUID | None:
    try:
        return uuid.UUID(text)
    except ValueError:
        prefix = text.removeprefix("cai-").partition("-")[0]
        key = (await store.find([prefix])).get(prefix)
        return None if key is None else key.id


def _permission(text: str) -> Permission:
    try:
        return Permission(text)
    except ValueError:
        raise ConfigError("--permission", text, ", ".join(Permission)) from None


def to_json(key: ApiKey) -> dict[str, Any]:
    """Return what may be shown of a key."""
    return {
        "id": str(key.id),
        "prefix": key.prefix,
        "name": key.name,
        "owner": key.owner,
        "permissions": sorted(key.permissions),
        "models": None if key.models is None else sorted(key.models),
        "created_at": _time(key.created_at),
        "created_by": key.created_by,
        "expires_at": _time(key.expires_at),
        "revoked_at": _time(key.revoked_at),
        "last_used_at": _time(key.last_used_at),
    }


def _time(value: Any) -> str | None:
    return None if value is None else str(value.isoformat())


def _row(key: ApiKey) -> list[str]:
    state = "revoked" if key.revoked_at else "valid" if key.is_valid(utc_now()) else "expired"
    used = f"{key.last_used_at:%Y-%m-%d %H:%M}" if key.last_used_at else "never"
    models = "all" if key.models is None else ", ".join(sorted(key.models))
    permissions = ", ".join(sorted(key.permissions))
    return [key.prefix, key.name or "", key.owner, permissions, models, state, used]
