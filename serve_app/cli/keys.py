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

from serve_app.audit.act import Actor
from serve_app.config import Bodies, LimitPolicy, parse_config
from serve_app.errors import ConfigError, NotFound
from serve_app.identity.api_keys import ApiKey, ApiKeyStore, KeyTerms
from serve_app.identity.principal import Permission
from serve_app.records import utc_now
from serve_app.settings import PostgresSettings
from serve_app.stack.accounts import key_store

_CLEARABLE = ("note", "models", "limits", "bodies", "expires_at")


def read_terms(
    name: str | None,
    note: str | None,
    permissions: Sequence[str] | None,
    models: Sequence[str] | None,
    limits: str | None,
    bodies: str | None,
    expires_in_days: float | None,
) -> dict[str, Any]:
    """Return the terms that options name, by their names in `KeyTerms`. Raises ConfigError."""
    named: dict[str, Any] = {"name": name, "note": note}
    if permissions:
        named["permissions"] = frozenset(_permission(text) for text in permissions)
    if models:
        named["models"] = frozenset(models)
    if limits is not None:
        named["limits"] = _limits(limits)
    if bodies is not None:
        named["bodies"] = _bodies(bodies)
    if expires_in_days is not None:
        named["expires_at"] = utc_now() + timedelta(days=expires_in_days)
    return {term: value for term, value in named.items() if value is not None}


def cleared(names: Sequence[str]) -> dict[str, None]:
    """Return the terms that are to be taken away. Raises ConfigError."""
    for name in names:
        if name not in _CLEARABLE:
            raise ConfigError("--clear", name, ", ".join(_CLEARABLE))
    return dict.fromkeys(names)


async def create(
    settings: PostgresSettings, owner: str, terms: dict[str, Any], as_json: bool
) -> None:
    """Make a key and print it."""
    async with key_store(settings) as store:
        plain, key = await store.create(KeyTerms(**terms), owner=owner, by=Actor.operator())
    _print_secret(plain, key, as_json)


async def show(settings: PostgresSettings, owner: str | None, as_json: bool) -> None:
    """Print the keys that there are."""
    async with key_store(settings) as store:
        keys = await store.list(owner)
    if as_json:
        typer.echo(json.dumps([key.to_openai() for key in keys]))
        return
    # Whole: it is what the other commands take. The id is in the JSON.
    prefix = Column("prefix", no_wrap=True)
    columns = ("name", "owner", "permissions", "models", "limits", "state", "last used")
    table = Table(prefix, *columns)
    for key in keys:
        table.add_row(*_row(key))
    Console().print(table)


async def change(settings: PostgresSettings, text: str, changes: dict[str, Any]) -> None:
    """Change the terms of a key."""
    async with key_store(settings) as store:
        key_id = await _find(store, text)
        await store.change(key_id, changes, by=Actor.operator())
    typer.echo(f"changed {key_id}")


async def rotate(settings: PostgresSettings, text: str, overlap_s: float, as_json: bool) -> None:
    """Give a key a new secret and print it."""
    async with key_store(settings) as store:
        key_id = await _find(store, text)
        plain, key = await store.rotate(
            key_id, overlap=timedelta(seconds=overlap_s), by=Actor.operator()
        )
    _print_secret(plain, key, as_json)


async def revoke(settings: PostgresSettings, text: str) -> None:
    """Revoke a key."""
    async with key_store(settings) as store:
        key_id = await _find(store, text)
        await store.revoke(key_id, by=Actor.operator())
    typer.echo(f"revoked {key_id}")


async def _find(store: ApiKeyStore, text: str) -> uuid.UUID:
    """Return the id of the key that `text` names by id, by prefix, or whole. Raises NotFound."""
    try:
        return uuid.UUID(text)
    except ValueError:
        prefix = text.removeprefix("cai-").partition("-")[0]
        key = (await store.find([prefix])).get(prefix)
    if key is None:
        raise NotFound(f"There is no key {prefix}.")
    return key.key_id


def _permission(text: str) -> Permission:
    try:
        return Permission(text)
    except ValueError:
        raise ConfigError("--permission", text, ", ".join(Permission)) from None


def _bodies(text: str) -> Bodies:
    try:
        return Bodies(text)
    except ValueError:
        raise ConfigError("--bodies", text, ", ".join(Bodies)) from None


def _limits(text: str) -> LimitPolicy:
    try:
        raw = json.loads(text)
    except json.JSONDecodeError:
        raise ConfigError("--limits", text, "a JSON object of limits") from None
    return parse_config(LimitPolicy, raw, "--limits")


def _print_secret(plain: str, key: ApiKey, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"key": plain, **key.to_openai()}))
        return
    typer.echo(plain)
    typer.echo("Keep it now: it is stored as a hash and is not shown again.", err=True)


def _row(key: ApiKey) -> list[str]:
    terms, limits = key.terms, key.to_openai()["limits"] or {}
    used = f"{key.last_used_at:%Y-%m-%d %H:%M}" if key.last_used_at else "never"
    return [
        key.prefix,
        terms.name,
        key.owner,
        ", ".join(sorted(terms.permissions)),
        "all" if terms.models is None else ", ".join(sorted(terms.models)),
        ", ".join(f"{name} {value}" for name, value in limits.items()),
        key.status(utc_now()),
        used,
    ]
