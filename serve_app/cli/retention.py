"""`comp-ai retention`: what is past its time, and removing it now."""

from __future__ import annotations

import json
from dataclasses import asdict
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
from serve_app.settings import PostgresSettings
from serve_app.stack.serve_api import read_config

_WHERE = "request_log.retention"


def read_policy(config: Path) -> RetentionPolicy:
    """Return what a Serve config YAML says of retention. Raises ConfigError."""
    # The port is for `up` alone.
    for application in read_config(config, port=0)["applications"]:
        options = (application.get("args") or {}).get("request_log") or {}
        if "retention" in options:
            return parse_config(RetentionPolicy, options["retention"], _WHERE)
    return RetentionPolicy()


async def retain(
    settings: PostgresSettings, policy: RetentionPolicy, *, really: bool, as_json: bool
) -> None:
    """Print what is past its time, or remove it and print what was removed."""
    async with connected(settings, "comp-ai retention") as connection:
        found = await (_removed(connection, policy) if really else expired(connection, policy))
    if as_json:
        typer.echo(json.dumps(_to_json(policy, found, really=really)))
    else:
        _show(policy, found, really=really)


async def _removed(connection: asyncpg.Connection, policy: RetentionPolicy) -> list[Expired]:
    return [done async for done in apply(connection, policy, Actor.operator())]


def _to_json(policy: RetentionPolicy, found: list[Expired], *, really: bool) -> dict[str, Any]:
    return {
        "applied": really,
        "policy": policy.model_dump(mode="json", exclude_none=True),
        "removed" if really else "expired": [asdict(one) for one in found],
    }


def _show(policy: RetentionPolicy, found: list[Expired], *, really: bool) -> None:
    for data in DataClass:
        keep = policy.of(data)
        typer.echo(f"{data.value}: kept {'for ever' if keep is None else f'for {keep}'}", err=True)
    numbers = [Column(name, justify="right") for name in ("rows", "held", "MiB")]
    table = Table("class", Column("from", no_wrap=True), "how", *numbers)
    for one in found:
        table.add_row(*_cells(one))
    if found:
        Console().print(table)
    else:
        typer.echo("nothing is past its time")
    if found and not really:
        typer.echo("Nothing was removed. Add --apply to remove it now.", err=True)


def _cells(one: Expired) -> list[str]:
    how = "dropped whole" if one.went else "rows removed"
    mebibytes = f"{one.size_bytes / 2**20:.1f}" if one.whole else ""
    return [one.data.value, one.partition, how, str(one.rows), str(one.held_rows), mebibytes]
