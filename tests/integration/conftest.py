"""A real PostgreSQL for the tests: one server, one migrated template, a copy for each test."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncpg
import pytest

from serve_app.database import connect, migrate
from serve_app.settings import PostgresSettings
from serve_app.stack.postgres import EmbeddedPostgres
from tests.integration.links import Link
from tests.stack_runner import descendants, has_ended, wait_until

MIGRATIONS = Path(__file__).parents[2] / "migrations"
_TEMPLATE = "template_comp_ai"
_READY_TIMEOUT_S = 60.0
_GONE_TIMEOUT_S = 30.0
_numbers = itertools.count(1)


class PostgresServer:
    """A server that tests can start, kill and start again."""

    def __init__(self, home: Path, *options: str) -> None:
        self.embedded = EmbeddedPostgres(home)
        self._options = options
        self._log = (home / "log").open("ab")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server and wait until it is ready."""
        self.embedded.prepare()
        self._process = subprocess.Popen(
            [*self.embedded.command(), *self._options],
            user=self.embedded.user,
            cwd="/",
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        asyncio.run(self.embedded.wait_ready(_READY_TIMEOUT_S))

    def kill(self) -> None:
        """End the postmaster with SIGKILL, as the kernel does when memory is short.

        Returns once its sessions are gone too. Each ends when it next waits for its client, so
        one that was not given the CPU since its last answer would answer once more.
        """
        assert self._process is not None
        sessions = descendants(self._process.pid)
        self._process.kill()
        self._process.wait()
        wait_until(lambda: all(map(has_ended, sessions)), "every session ended", _GONE_TIMEOUT_S)

    def stop(self) -> None:
        """Stop the server, sessions or not."""
        asyncio.run(self.embedded.stop())
        if self._process is not None:
            self._process.wait()
        self._log.close()

    def admin(self, statement: str) -> None:
        """Run one statement as the superuser."""
        asyncio.run(_execute(self.embedded.admin_settings(), statement))

    def new_database(self, template: str) -> PostgresSettings:
        """Create a database of comp_ai from `template`."""
        name = f"test_{next(_numbers)}"
        self.admin(f"CREATE DATABASE {name} TEMPLATE {template} OWNER comp_ai")
        return self.embedded.settings().model_copy(update={"database": name})

    def drop(self, settings: PostgresSettings) -> None:
        """Drop a database, and cut whoever is still in it."""
        self.admin(f"DROP DATABASE IF EXISTS {settings.database} WITH (FORCE)")


async def _execute(settings: PostgresSettings, statement: str) -> None:
    connection = await connect(settings, application_name="tests")
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


@contextmanager
def _serve(prepared: Path, *options: str) -> Iterator[PostgresServer]:
    # Not pytest's tmp_path: a socket's path is limited to 107 bytes.
    home = Path(tempfile.mkdtemp(prefix="cai-"))
    # `cp -a` and not shutil: under root the data belongs to another user.
    subprocess.run(["cp", "-a", f"{prepared}/postgres", home], check=True)
    server = PostgresServer(home, *options)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(home)


@pytest.fixture(scope="session")
def _prepared_home() -> Iterator[Path]:
    """A home with a database that was never started: making one takes seconds."""
    home = Path(tempfile.mkdtemp(prefix="cai-"))
    EmbeddedPostgres(home).prepare()
    yield home
    shutil.rmtree(home)


@pytest.fixture(scope="session")
def postgres_server(_prepared_home: Path) -> Iterator[PostgresServer]:
    """One PostgreSQL for all tests; holds the migrated template database."""
    # Without fsync: this server is never cut off, and each test makes and drops a database.
    with _serve(_prepared_home, "-c", "fsync=off") as server:
        server.admin(f"CREATE DATABASE {_TEMPLATE} OWNER comp_ai")
        template = server.embedded.settings().model_copy(update={"database": _TEMPLATE})
        asyncio.run(migrate(template, directory=MIGRATIONS))
        yield server


@pytest.fixture
def own_server(_prepared_home: Path) -> Iterator[PostgresServer]:
    """A PostgreSQL that the test may kill; its database comp_ai is migrated."""
    with _serve(_prepared_home) as server:
        asyncio.run(migrate(server.embedded.settings(), directory=MIGRATIONS))
        yield server


@pytest.fixture
def database(postgres_server: PostgresServer) -> Iterator[PostgresSettings]:
    """A fresh migrated database."""
    settings = postgres_server.new_database(_TEMPLATE)
    yield settings
    postgres_server.drop(settings)


@pytest.fixture
async def connection(database: PostgresSettings) -> AsyncIterator[asyncpg.Connection]:
    """A connection to `database`, as the role that the service has."""
    opened = await connect(database, application_name="tests")
    yield opened
    await opened.close()


@pytest.fixture
async def link(database: PostgresSettings) -> AsyncIterator[Link]:
    """A link to `database` that the test may break."""
    link = Link(database)
    await link.mend()
    yield link
    await link.cut()


@pytest.fixture
def empty_database(postgres_server: PostgresServer) -> Iterator[PostgresSettings]:
    """A fresh database without our schema."""
    settings = postgres_server.new_database("template1")
    yield settings
    postgres_server.drop(settings)
