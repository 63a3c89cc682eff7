"""`comp-ai subject`: what the commands do and print."""

from __future__ import annotations

import json
import os
import sys
from contextlib import aclosing
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import typer
from rich.console import Console
from rich.table import Table

from serve_app.accounts.sealing.master_keys import MasterKeys
from serve_app.accounts.sealing.subject_keys import SubjectKeys
from serve_app.audit.act import Actor
from serve_app.cli.connection import connected
from serve_app.errors import ConfigError
from serve_app.settings import PostgresSettings
from serve_app.subjects import report
from serve_app.subjects.erasing import Eraser
from serve_app.subjects.exporting import export, note_export
from serve_app.subjects.holds import LegalHold, list_holds, release_hold, set_hold

_NAME = "comp-ai subject"


async def write_export(
    settings: PostgresSettings, masters: MasterKeys, subject: str, file: Path
) -> None:
    """Write all that is kept of `subject` to `file`, or to stdout where that is `-`."""
    async with connected(settings, _NAME) as connection:
        await note_export(connection, subject, Actor.operator())
        with _opened(file) as out:
            async with aclosing(export(connection, subject, SubjectKeys(masters))) as lines:
                count = 0
                async for line in lines:
                    out.write(line)
                    count += 1
            out.flush()
    typer.echo(f"{count} lines written", err=True)


async def show_counts(
    settings: PostgresSettings, masters: MasterKeys, subject: str, *, as_json: bool
) -> None:
    """Print what an erasure would find; changes nothing."""
    async with connected(settings, _NAME) as connection:
        found = await Eraser(connection, masters).count(subject)
    if as_json:
        typer.echo(json.dumps({"subject": subject, "found": found}))
        return
    for place, rows in found.items():
        typer.echo(f"{place}: {rows}")
    typer.echo("Nothing was changed.", err=True)


async def erase(settings: PostgresSettings, masters: MasterKeys, subject: str, file: Path) -> None:
    """Erase `subject` and write the signed report to `file`, or to stdout where that is `-`."""
    with _opened(file) as out:
        async with connected(settings, _NAME) as connection:
            erased = await Eraser(connection, masters).erase(subject, Actor.operator())
        signed = report.signed_report(erased, masters)
        out.write(orjson.dumps(signed, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
        out.flush()
    typer.echo("Run `comp-ai backup keyring` now: the ring still holds the key.", err=True)


def check(file: Path, masters: MasterKeys) -> None:
    """Print what a report says, if one of our master keys has signed it.

    Raises:
        ReportInvalid, MasterKeyMissing: it was not, or was changed.
    """
    try:
        data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        raise ConfigError("FILE", str(file), f"a report ({type(error).__name__})") from None
    found = report.verify(data, masters)
    typer.echo(f"the report is ours and unchanged: {found.get('subject')!r} was erased, what was")
    typer.echo(f"made until {found.get('erased_at')}; its pseudonym is {found.get('pseudonym')}")


async def hold(settings: PostgresSettings, subject: str, reason: str) -> None:
    """Put `subject` under a legal hold."""
    async with connected(settings, _NAME) as connection:
        await set_hold(connection, subject, reason, Actor.operator())
    typer.echo(f"{subject} is under a legal hold")


async def release(settings: PostgresSettings, subject: str) -> None:
    """End the legal hold on `subject`."""
    async with connected(settings, _NAME) as connection:
        await release_hold(connection, subject, Actor.operator())
    typer.echo(f"the legal hold on {subject} is released")


async def show_holds(settings: PostgresSettings, *, released_too: bool, as_json: bool) -> None:
    """Print the legal holds."""
    async with connected(settings, _NAME) as connection:
        holds = await list_holds(connection, released_too=released_too)
    if as_json:
        typer.echo(json.dumps([one.to_json() for one in holds]))
        return
    table = Table("subject", "reason", "set by", "set at (UTC)", "released")
    for one in holds:
        table.add_row(*_row(one))
    Console().print(table)


def _row(one: LegalHold) -> list[str]:
    released = f"{one.released_at:%Y-%m-%d %H:%M}" if one.released_at else ""
    return [one.subject, one.reason, one.set_by, f"{one.set_at:%Y-%m-%d %H:%M}", released]


def _opened(file: Path) -> Any:
    """Open `file` for writing; it must not be there yet, and only we may read it."""
    if str(file) == "-":
        return _Stdout()
    try:
        return os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
    except OSError as error:
        allowed = f"a file that is not there yet ({error.strerror})"
        raise ConfigError("--output", str(file), allowed) from None


class _Stdout:
    """Stdout, which is not ours to close."""

    def __enter__(self) -> BinaryIO:
        return sys.stdout.buffer

    def __exit__(self, *_: object) -> None:
        sys.stdout.buffer.flush()
