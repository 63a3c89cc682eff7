"""The PostgreSQL of compose.yaml as it is started there, with what make-secrets.sh makes.

It needs a server that was built with TLS, which the embedded one is not: Debian's and Ubuntu's
package `postgresql` is.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import certifi
import pytest
import yaml

from serve_app.backup.errors import BackupError
from serve_app.backup.programs import PostgresPrograms
from serve_app.database import DatabaseUnavailable, connect
from serve_app.settings import PostgresSettings, load_settings
from tests.stack_runner import free_ports

FOLDER = Path(__file__).parents[2] / "k8s-free-compose"
SERVICE = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]["postgres"]
PROGRAMS = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)
# Root may not run a server; the package made this user.
USER = "postgres" if os.geteuid() == 0 else None
# The certificate names the first of these loopback addresses.
NAMED, UNNAMED = "127.0.0.1", "127.0.0.2"
pytestmark = pytest.mark.skipif(PROGRAMS is None, reason="no PostgreSQL of the system")


def _here(text: str, home: Path) -> str:
    """Put the folders of the container below `home`."""
    for inside in ("/run/secrets", "/run/postgresql", "/opt/comp-ai"):
        text = text.replace(inside, str(home / Path(inside).name))
    return text


# What the image's does once the database is made, and as it does it while it makes it.
ENTRYPOINT = """#!/bin/sh
shift
exec pg_ctl --wait --silent --log="$PGDATA/log" --options="$*" start
"""


def _prepare(home: Path) -> None:
    (home / "postgresql").mkdir()
    environ = os.environ | {"COMP_AI_NODE_ADDRESS": NAMED}
    script = FOLDER / "make-secrets.sh"
    subprocess.run([script, home / "secrets"], env=environ, check=True, capture_output=True)
    shutil.copytree(FOLDER / "postgres" / "server", home / "comp-ai")
    start = home / "comp-ai" / "start.sh"
    start.write_text(_here(start.read_text(), home))
    (home / "docker-entrypoint.sh").write_text(ENTRYPOINT)
    (home / "docker-entrypoint.sh").chmod(0o755)
    if USER is not None:
        for path in (home, *home.rglob("*")):
            shutil.chown(path, USER)


@pytest.fixture(scope="module")
def served() -> Iterator[PostgresSettings]:
    """Start it at loopback, with a role that has a password; yield how to come in."""
    # Not pytest's tmp_path, which another user may not enter.
    home = Path(tempfile.mkdtemp(prefix="cai-"))
    _prepare(home)
    [port] = free_ports(1)
    environ = {
        "PATH": f"{home}:{PROGRAMS}:/usr/bin:/bin",
        "PGDATA": str(home / "data"),
        "PGHOST": str(home),
        "PGPORT": str(port),
    }

    def run(*command: str) -> None:
        subprocess.run(
            command, check=True, stdout=subprocess.DEVNULL, env=environ, cwd="/", user=USER
        )

    # Whoever comes in does so by compose's rules: those of initdb refuse everybody.
    run("initdb", "--username=postgres", "--auth=reject")
    # The image listens at all addresses.
    listen = f"--listen_addresses={NAMED},{UNNAMED}"
    own = (listen, f"--port={port}", f"--unix_socket_directories={home}", "--fsync=off")
    run(*(_here(word, home) for word in [*SERVICE["entrypoint"], *SERVICE["command"]]), *own)
    try:
        run("psql", "-qXU", "postgres", "-c", "create role comp_ai login password 'right'")
        run("createdb", "--username=postgres", "--owner=comp_ai", "comp_ai")
        given = {"POSTGRES_HOST": NAMED, "POSTGRES_PORT": str(port), "POSTGRES_PASSWORD": "right"}
        ca = str(home / "secrets" / "postgres_ca")
        tls = {"POSTGRES_SSLMODE": "verify-full", "POSTGRES_SSLROOTCERT": ca}
        yield load_settings(given | tls).postgres
    finally:
        run("pg_ctl", "--mode=immediate", "stop")
        shutil.rmtree(home)


async def _encrypted(settings: PostgresSettings) -> bool:
    connection = await connect(settings, application_name="tests")
    try:
        return bool(
            await connection.fetchval("select ssl from pg_stat_ssl where pid = pg_backend_pid()")
        )
    finally:
        await connection.close()


async def test_the_service_name_and_the_hosts_address_pass(
    served: PostgresSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await _encrypted(served)
    resolve = socket.getaddrinfo

    def known(host: Any, *arguments: Any, **named: Any) -> Any:
        return resolve(NAMED if host == "postgres" else host, *arguments, **named)

    monkeypatch.setattr(socket, "getaddrinfo", known)
    assert await _encrypted(served.model_copy(update={"host": "postgres"}))


async def test_another_ca_and_another_name_are_refused(served: PostgresSettings) -> None:
    # The certificates of public CAs: ours is not one of them.
    for changes in ({"sslrootcert": certifi.where()}, {"host": UNNAMED}):
        with pytest.raises(DatabaseUnavailable, match="TLS failed"):
            await connect(served.model_copy(update=changes), application_name="tests")


async def test_what_is_not_encrypted_is_refused(served: PostgresSettings) -> None:
    with pytest.raises(DatabaseUnavailable, match="refuses the role"):
        await connect(served.model_copy(update={"sslmode": "disable"}), application_name="tests")
    # By its rules, not for want of the role or of its password.
    assert await _encrypted(served.model_copy(update={"sslmode": "require"}))


async def test_pg_dump_comes_in_by_the_same_rules(served: PostgresSettings, tmp_path: Path) -> None:
    programs = PostgresPrograms(PROGRAMS)
    connection = await connect(served, application_name="tests")
    try:
        await connection.execute("create schema comp_ai; create schema comp_ai_keys")
        async with connection.transaction(isolation="repeatable_read"):
            snapshot = await connection.fetchval("select pg_export_snapshot()")
            await programs.dump(served, tmp_path / "dump", snapshot=snapshot)
            await programs.check_dump(tmp_path / "dump")
            plain = served.model_copy(update={"sslmode": "disable"})
            with pytest.raises(BackupError, match="no encryption"):
                await programs.dump(plain, tmp_path / "dump", snapshot=snapshot)
    finally:
        await connection.close()
