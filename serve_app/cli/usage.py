"""`comp-ai usage`: what it asks and prints."""

from __future__ import annotations

import json
import uuid
from typing import Any

import asyncpg
import typer
from rich.console import Console
from rich.table import Table

from serve_app.database import CONNECT_ERRORS, DatabaseUnavailable, connect
from serve_app.errors import ConfigError, InvalidRequest
from serve_app.settings import PostgresSettings
from serve_app.times import parse_time
from serve_app.usage.question import UsagePage, UsageQuestion, read_groups, usual_start
from serve_app.usage.reading import UsageStatement, columns, prepare, read_usage
from serve_app.usage.table import to_csv


def read_question(
    group_by: str, since: str | None, until: str | None, limit: int, **named: str | None
) -> UsageStatement:
    """Return what the options ask for. Raises ConfigError where they are wrong."""
    try:
        unit, by = read_groups(group_by)
        key = named["key"]
        question = UsageQuestion(
            since=usual_start(unit) if since is None else parse_time(since),
            until=None if until is None else parse_time(until),
            unit=unit,
            by=by,
            principal=named["principal"],
            model=named["model"],
            key=None if key is None else uuid.UUID(key),
        )
        return prepare(question, UsagePage(limit=limit))
    except InvalidRequest as error:
        option = f"--{(error.param or 'group_by').replace('_', '-')}"
        raise ConfigError(option, group_by, error.message) from None
    except (ValueError, OverflowError):
        allowed = "times in ISO 8601, such as 2026-01-31, and the id of a key"
        raise ConfigError("--from, --to, --key", (since, until, named["key"]), allowed) from None


async def show(
    settings: PostgresSettings, asked: UsageStatement, *, as_json: bool, as_csv: bool
) -> None:
    """Print the rows, the newest first."""
    rows = await _read(settings, asked)
    names = columns(asked.question)
    if as_json:
        typer.echo(json.dumps(rows))
    elif as_csv:
        typer.echo(to_csv(names, rows).decode(), nl=False)
    else:
        Console().print(_table(names, rows))


async def _read(settings: PostgresSettings, asked: UsageStatement) -> list[dict[str, Any]]:
    connection = await connect(settings, application_name="comp-ai usage")
    try:
        return await read_usage(connection, asked)
    except asyncpg.UndefinedTableError as error:
        raise DatabaseUnavailable("There is no usage yet. Run `comp-ai migrate`.") from error
    except CONNECT_ERRORS as error:
        name = type(error).__name__
        raise DatabaseUnavailable(f"PostgreSQL broke off: {name}.") from error
    finally:
        connection.terminate()


def _table(names: list[str], rows: list[dict[str, Any]]) -> Table:
    table = Table(*(name.replace("_", " ") for name in names))
    for row in rows:
        table.add_row(*(_cell(row[name]) for name in names))
    return table


def _cell(value: Any) -> str:
    # A terminal must not obey what somebody had written into the accounts.
    text = "" if value is None else str(value).replace("[", "\\[")
    return "".join(character if character.isprintable() else "?" for character in text)
