"""`comp-ai log drift`: what the command does and prints."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer
from rich.console import Console
from rich.table import Column, Table

from serve_app.accounts.drift import ModelDrift, read_drift
from serve_app.cli.connection import connected
from serve_app.settings import PostgresSettings


async def show(settings: PostgresSettings, most: float, *, as_json: bool) -> int:
    """Print the drift of each model; return the exit code: 1 where one is above `most`."""
    async with connected(settings, "comp-ai log drift") as connection:
        found = await read_drift(connection)
    if as_json:
        typer.echo(json.dumps([asdict(one) | {"ratio": one.ratio} for one in found]))
    elif found:
        _print(found)
    else:
        typer.echo("no engine has told counts that are old enough to compare")
    return 1 if any(abs(one.ratio) > most for one in found) else 0


def _print(found: list[ModelDrift]) -> None:
    numbers = [Column(name, justify="right") for name in ("engine", "log", "open", "drift", "%")]
    table = Table("model", "replicas", *numbers)
    for one in found:
        counts = (one.engine_tokens, one.log_tokens, one.open_tokens, one.tokens)
        cells = (f"{count:,}" for count in counts)
        table.add_row(one.model, str(one.replicas), *cells, f"{one.ratio * 100:+.2f}")
    Console().print(table)
