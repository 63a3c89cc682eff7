"""`comp-ai master-key`: make a new master key, and wrap the keys of subjects with it."""

from __future__ import annotations

import os
from pathlib import Path

import typer

from serve_app.accounts.sealing.master_keys import SETTING, MasterKeys, new_master_key
from serve_app.accounts.sealing.rotation import rotate as rotate_keys
from serve_app.audit.act import Actor
from serve_app.database import connect
from serve_app.errors import ConfigError
from serve_app.settings import PostgresSettings
from serve_app.stack.home import Home, write_secret


def add_new(home: Home) -> None:
    """Put a new master key before the others, or print it where the environment holds them.

    Raises:
        ConfigError: the file holds no master keys, or cannot be written.
    """
    key = new_master_key()
    if os.environ.get(SETTING):
        typer.echo(key)
        typer.echo(f"Put it before the others in {SETTING}, as the first one.", err=True)
        return
    path = Path(os.environ.get(f"{SETTING}_FILE") or home.master_key)
    _prepend(path, key)
    typer.echo(f"{MasterKeys.parse(key).current_id} is now the first master key in {path}")
    typer.echo("Restart the service, then run `comp-ai master-key rotate`.", err=True)


def _prepend(path: Path, key: str) -> None:
    try:
        before = path.read_text(encoding="ascii").strip() if path.exists() else ""
        if before:
            MasterKeys.parse(before)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_secret(path, "\n".join(filter(None, [key, before])) + "\n")
    except (OSError, UnicodeError) as error:
        allowed = f"a file of master keys that we may write ({type(error).__name__})"
        raise ConfigError(f"{SETTING}_FILE", str(path), allowed) from None


async def rotate(settings: PostgresSettings, masters: MasterKeys) -> None:
    """Wrap every key of a subject with the first master key.

    Raises:
        DatabaseUnavailable: PostgreSQL cannot be reached.
        MasterKeyMissing: some need a master key that is not named; the others are done.
    """
    connection = await connect(settings, application_name="comp-ai master-key")
    try:
        count = await rotate_keys(connection, masters, Actor.operator())
    finally:
        await connection.close()
    typer.echo(f"{count} keys were wrapped anew with the master key {masters.current_id}")
    for name in masters.ids[1:]:
        typer.echo(
            f"no key needs the master key {name} any more; once the spools are empty, it may go"
        )
