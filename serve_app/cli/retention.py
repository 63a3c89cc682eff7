"""`comp-ai retention`: what is past its time, and removing it now."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import asyncpg
import typer
from rich.console import Console
from rich.table import Column, Table

from serve_app.accounts.retention.keeping import Expired, apply, expired
from serve_app.accounts.retention.policy import DataClass, RetentionPolicy
from serve_app.audit.act import Actor
from serve_app.cli.connection import connected
from serve_app.config import parse_config
from serve_app.errors import ConfigError
from serve_app.identity.key_sweep import DEFAULT_DAYS, EndedKeys, count_ended, remove_ended
from serve_app.settings import PostgresSettings
from serve_app.stack.serve_api import read_config

_WHERE = "request_log.retention"
_KEYS = "ended_keys_days"
_MOST_DAYS = 36_500


@dataclass(frozen=True, slots=True)
class Kept:
    """How long what is kept; `ended_keys_days` None is for ever."""

    policy: RetentionPolicy
    ended_keys_days: int | None


@dataclass(frozen=True, slots=True)
class _Found:
    """What is past its time; `keys` None: they are kept for ever."""

    expired: list[Expired]
    keys: EndedKeys | None


def read_kept(config: Path) -> Kept:
    """Return what a Serve config YAML says of retention. Raises ConfigError."""
    # The port is for `up` alone.
    applications = read_config(config, port=0)["applications"]
    options: dict[str, Any] = {}
    for application in applications:
        options |= (application.get("args") or {}).get("request_log") or {}
    policy = parse_config(RetentionPolicy, options.get("retention", {}), _WHERE)
    return Kept(policy, _days(options.get(_KEYS, DEFAULT_DAYS)))


def _days(value: object) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST_DAYS:
        raise ConfigError(f"request_log.{_KEYS}", value, f"1 to {_MOST_DAYS} days, or null")
    return value


async def retain(settings: PostgresSettings, kept: Kept, *, really: bool, as_json: bool) -> None:
    """Print what is past its time, or remove it and print what was removed."""
    async with connected(settings, "comp-ai retention") as connection:
        found = await (_removed(connection, kept) if really else _expired(connection, kept))
    if as_json:
        typer.echo(json.dumps(_to_json(kept, found, really=really)))
    else:
        _show(kept, found, really=really)


async def _expired(connection: asyncpg.Connection, kept: Kept) -> _Found:
    days = kept.ended_keys_days
    keys = None if days is None else await count_ended(connection, days)
    return _Found(await expired(connection, kept.policy), keys)


async def _removed(connection: asyncpg.Connection, kept: Kept) -> _Found:
    by, days = Actor.operator(), kept.ended_keys_days
    removed = [done async for done in apply(connection, kept.policy, by)]
    return _Found(removed, None if days is None else await remove_ended(connection, days, by))


def _to_json(kept: Kept, found: _Found, *, really: bool) -> dict[str, Any]:
    return {
        "applied": really,
        "policy": kept.policy.model_dump(mode="json", exclude_none=True),
        _KEYS: kept.ended_keys_days,
        "removed" if really else "expired": [asdict(one) for one in found.expired],
        "ended_keys": None if found.keys is None else asdict(found.keys),
    }


def _show(kept: Kept, found: _Found, *, really: bool) -> None:
    for data in DataClass:
        _tell(data.value, kept.policy.of(data))
    days = kept.ended_keys_days
    _tell("ended API keys", None if days is None else f"{days} days")
    numbers = [Column(name, justify="right") for name in ("rows", "held", "MiB")]
    table = Table("class", Column("from", no_wrap=True), "how", *numbers)
    for one in found.expired:
        table.add_row(*_cells(one))
    if found.keys is not None and (found.keys.rows or found.keys.held_rows):
        numbers_of_keys = str(found.keys.rows), str(found.keys.held_rows)
        table.add_row("ended API keys", "comp_ai.api_keys", "rows removed", *numbers_of_keys, "")
    if table.row_count:
        Console().print(table)
    else:
        typer.echo("nothing is past its time")
    if table.row_count and not really:
        typer.echo("Nothing was removed. Add --apply to remove it now.", err=True)


def _tell(what: str, keep: object) -> None:
    typer.echo(f"{what}: kept {'for ever' if keep is None else f'for {keep}'}", err=True)


def _cells(one: Expired) -> list[str]:
    how = "dropped whole" if one.went else "rows removed"
    mebibytes = f"{one.size_bytes / 2**20:.1f}" if one.whole else ""
    return [one.data.value, one.partition, how, str(one.rows), str(one.held_rows), mebibytes]
