"""The commands below `comp-ai backup`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from serve_app.settings import Settings

app = typer.Typer(help="Backups of the accounts: make, verify, restore, rehearse.")

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ScratchOption = Annotated[
    str | None,
    typer.Option(help="An empty database to restore into, where our role may make none."),
]
FileArgument = Annotated[
    str | None, typer.Argument(metavar="FILE", help="Name or path of a backup; the newest.")
]


@app.command("create")
def create(as_json: JsonOption = False) -> None:
    """Back up, read it back, then remove what the scheme does not keep."""
    from serve_app.cli import backup

    asyncio.run(backup.create(_settings(), as_json=as_json))


@app.command("verify")
def verify(
    file: FileArgument = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Restore into a scratch database and compare all rows.")
    ] = False,
    scratch: ScratchOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read a backup back; exit code 1 if it is not what was written."""
    from serve_app.cli import backup

    asyncio.run(backup.check(_settings(), file, scratch, deep=deep, as_json=as_json))


@app.command("restore")
def restore(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Name or path of a backup.")],
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace what is there, after a backup of it.")
    ] = False,
    without_keyring: Annotated[
        bool, typer.Option("--without-keyring", help="Do without the keys of the subjects.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Restore into an empty database, verify, and do again what was erased since.

    Stop the service first. An embedded PostgreSQL is started for the time that it takes.
    """
    from serve_app.cli import backup

    work = backup.bring_back(
        _settings(), file, replaces=replace, without_keyring=without_keyring, as_json=as_json
    )
    asyncio.run(work)


@app.command("list")
def show(as_json: JsonOption = False) -> None:
    """List the backups, newest first."""
    from serve_app.cli import backup

    backup.show(_settings(), as_json=as_json)


@app.command("prune")
def prune(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what goes.")] = False,
) -> None:
    """Remove the backups that the scheme does not keep."""
    from serve_app.cli import backup

    backup.prune(_settings(), dry_run=dry_run)


@app.command("keyring")
def keyring() -> None:
    """Write the key ring anew, as every backup does, and destroy the one before."""
    from serve_app.cli import backup

    asyncio.run(backup.write_keyring(_settings()))


@app.command("drill")
def drill(
    scratch: ScratchOption = None,
    breaks: Annotated[
        bool, typer.Option("--break", help="Damage the scratch database, and restore it again.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Back up, restore into a scratch database, verify and drop it; tell times and sizes."""
    from serve_app.cli import backup

    asyncio.run(backup.rehearse(_settings(), scratch, breaks=breaks, as_json=as_json))


def _settings() -> Settings:
    from serve_app.settings import load_settings

    return load_settings()
