"""PostgreSQL of the accounts, for a command: one that runs, or the embedded one meanwhile."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from serve_app.settings import PostgresSettings, Settings
from serve_app.stack.accounts import is_embedded
from serve_app.stack.home import Home
from serve_app.stack.postgres import EmbeddedPostgres
from serve_app.stack.processes import HOME_MARK, rotate

_READY_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AccountsServer:
    """How to reach the accounts; `maker` may make databases beside them."""

    postgres: PostgresSettings
    maker: PostgresSettings


@asynccontextmanager
async def accounts_server(
    settings: Settings, environ: Mapping[str, str]
) -> AsyncIterator[AccountsServer]:
    """Lend the accounts' server; an embedded one that does not run is started and stopped again.

    Raises:
        ConfigError: the embedded server cannot be prepared.
        AlreadyRunning: `comp-ai up` is starting or stopping.
        PostgresNotReady: it does not start.
    """
    if not is_embedded(environ):
        own = settings.postgres
        yield AccountsServer(postgres=own, maker=own)
        return
    home = Home(settings.service.home_path)
    embedded = EmbeddedPostgres(home.path)
    if embedded.running_pid() is not None:
        yield _of(embedded)
        return
    home.prepare()
    with home.lock():
        await asyncio.to_thread(embedded.prepare)
        async with _started(embedded, home):
            yield _of(embedded)


def _of(embedded: EmbeddedPostgres) -> AccountsServer:
    return AccountsServer(postgres=embedded.settings(), maker=embedded.admin_settings())


def programs_folder(settings: Settings, environ: Mapping[str, str]) -> Path | None:
    """Return the folder of pg_dump and pg_restore, or None for those of PATH.

    Where PATH has none those of the embedded server are taken, which cannot encrypt.

    Raises:
        ConfigError: there are none.
    """
    if settings.backup.programs is not None:
        return settings.backup.programs
    if not is_embedded(environ) and shutil.which("pg_dump", path=environ.get("PATH")):
        return None
    return EmbeddedPostgres(settings.service.home_path).bin_dir


@asynccontextmanager
async def _started(embedded: EmbeddedPostgres, home: Home) -> AsyncIterator[None]:
    log = home.logs / "postgres.log"
    rotate(log)
    identity = {} if embedded.user is None else {"user": embedded.user, "group": embedded.user}
    with log.open("ab") as opened:
        process = await asyncio.create_subprocess_exec(
            *embedded.command(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=opened,
            stderr=opened,
            # By this a next `up` knows it, should we be killed before we stop it.
            env=os.environ | {HOME_MARK: str(home.path)},
            start_new_session=True,  # Ctrl-C is for us; we stop it ourselves
            **identity,  # type: ignore[arg-type]  # passed on to subprocess.Popen
        )
    try:
        await embedded.wait_ready(_READY_TIMEOUT_S)
        yield
    finally:
        await embedded.stop()
        await process.wait()
