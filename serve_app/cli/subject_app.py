"""The commands below `comp-ai subject`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from serve_app.accounts.sealing.master_keys import MasterKeys
    from serve_app.settings import PostgresSettings

app = typer.Typer(help="All that is kept of one person: export, erasure, legal holds.")

SubjectArgument = Annotated[str, typer.Argument(help="Id of the principal.")]
OutputOption = Annotated[Path, typer.Option(help="File to write; it must be new. - for stdout.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("export")
def export(subject: SubjectArgument, output: OutputOption = Path("-")) -> None:
    """Write all that is kept of a person as JSON Lines."""
    from serve_app.cli import subject as work

    settings, masters = _settings()
    asyncio.run(work.write_export(settings, masters, subject, output))


@app.command("erase")
def erase(
    subject: SubjectArgument,
    output: OutputOption = Path("-"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count the rows.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Erase a person and write a signed report; goes on with one that was broken off."""
    from serve_app.cli import subject as work

    settings, masters = _settings()
    if dry_run:
        asyncio.run(work.show_counts(settings, masters, subject, as_json=as_json))
    else:
        asyncio.run(work.erase(settings, masters, subject, output))


@app.command("verify")
def verify(
    file: Annotated[Path, typer.Argument(help="Report of an erasure; - for stdin.")],
) -> None:
    """Check the signature of a report; exit code 1 if it is not ours or was changed."""
    from serve_app.cli import subject as work

    work.check(file, _masters())


@app.command("hold")
def hold(
    subject: SubjectArgument,
    reason: Annotated[str, typer.Option(help="Why its data must stay.")],
) -> None:
    """Put a person under a legal hold: nothing of it is removed or erased."""
    from serve_app.cli import subject as work

    asyncio.run(work.hold(_settings()[0], subject, reason))


@app.command("release")
def release(subject: SubjectArgument) -> None:
    """End the legal hold on a person."""
    from serve_app.cli import subject as work

    asyncio.run(work.release(_settings()[0], subject))


@app.command("holds")
def holds(
    released: Annotated[bool, typer.Option("--all", help="Those that ended, too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the legal holds in force."""
    from serve_app.cli import subject as work

    asyncio.run(work.show_holds(_settings()[0], released_too=released, as_json=as_json))


def _settings() -> tuple[PostgresSettings, MasterKeys]:
    import os

    from serve_app.settings import load_settings
    from serve_app.stack.accounts import postgres_settings
    from serve_app.stack.home import Home

    settings = load_settings()
    home = Home(settings.service.home_path)
    return postgres_settings(settings, home, os.environ), _masters()


def _masters() -> MasterKeys:
    import os

    from serve_app.settings import load_settings
    from serve_app.stack.accounts import master_keys_of
    from serve_app.stack.home import Home

    settings = load_settings()
    return master_keys_of(settings, Home(settings.service.home_path), os.environ)
