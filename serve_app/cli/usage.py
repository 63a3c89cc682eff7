"""`comp-ai usage`: what it asks and prints."""

from __future__ import annotations

import json
import sys
import uuid
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from serve_app.cli.connection import connected
from serve_app.errors import ConfigError, InvalidRequest
from serve_app.settings import PostgresSettings
from serve_app.times import parse_time
from serve_app.usage.question import UsagePage, UsageQuestion, read_groups, usual_start
from serve_app.usage.reading import UsageStatement, columns, prepare, read_usage
from serve_app.usage.table import to_csv


def read_question(
    group_by: str,
    since: str | None,
    until: str | None,
    limit: int,
    after: str | None,
    **named: str | None,
) -> UsageStatement:
    """Return what the options ask for, and one row more. Raises ConfigError: one is wrong."""
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
        # One more, to know whether there are more.
        return prepare(question, UsagePage(limit=limit + 1, after=after))
    except InvalidRequest as error:
        given = {"group_by": group_by, "from": since, "to": until, "after": after}
        param = error.param or "group_by"
        raise ConfigError(_option(param), given[param], error.message) from None
    except (ValueError, OverflowError):
        allowed = "times in ISO 8601, such as 2026-01-31, and the id of a key"
        raise ConfigError("--from, --to, --key", (since, until, named["key"]), allowed) from None


def _option(param: str) -> str:
    return f"--{param.replace('_', '-')}"


async def show(
    settings: PostgresSettings, asked: UsageStatement, limit: int, *, as_json: bool, as_csv: bool
) -> None:
    """Print `limit` rows, the newest first, and say on stderr where more begin."""
    async with connected(settings, "comp-ai usage") as connection:
        found = await read_usage(connection, asked)
    rows, names = found[:limit], columns(asked.question)
    if as_json:
        typer.echo(json.dumps(rows))
    elif as_csv:
        # Not `echo`, which takes out of a text what a terminal might obey.
        sys.stdout.buffer.write(to_csv(names, rows))
    else:
        Console().print(_table(names, rows))
    if len(found) > limit:
        typer.echo(f"There are more: go on with --after {rows[-1]['id']}", err=True)


def _table(names: list[str], rows: list[dict[str, Any]]) -> Table:
    table = Table(*(name.replace("_", " ") for name in names))
    for row in rows:
        table.add_row(*(_cell(row[name]) for name in names))
    return table


def _cell(value: Any) -> str:
    # A terminal must not obey what somebody had written into the accounts.
    text = "" if value is None else str(value).replace("[", "\\[")
    return "".join(character if character.isprintable() else "?" for character in text)
