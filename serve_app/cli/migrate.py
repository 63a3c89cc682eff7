"""`comp-ai migrate`: what the command does and prints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import typer

from serve_app.audit.act import Actor
from serve_app.database import Migration, migrate, plan
from serve_app.migration_effects import effects
from serve_app.settings import PostgresSettings

# Of `--plan`: the schema lacks something.
PENDING = 3


async def show_plan(settings: PostgresSettings, directory: Path) -> int:
    """Print what would be applied, and return the exit code: 0 nothing, `PENDING` something."""
    pending = await plan(settings, directory=directory)
    for migration in pending:
        for line in _described(migration):
            typer.echo(line)
    if not pending:
        typer.echo("the schema is up to date")
    return PENDING if pending else 0


async def apply(settings: PostgresSettings, directory: Path) -> None:
    """Apply what is pending and print it."""
    applied = await migrate(settings, directory=directory, actor=Actor.operator())
    for migration in applied:
        typer.echo(f"applied: {migration.label}")
    if not applied:
        typer.echo("the schema is up to date")


def _described(migration: Migration) -> Iterator[str]:
    yield f"to apply: {migration.label}  sha256 {migration.sha256}"
    found = effects(migration.sql)
    for effect in found:
        yield f"    {effect}"
    if not found:
        yield "    locks nothing that is there"
