"""The command line as an operator meets it: exit codes, one line for a failure."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jwt
import pytest

from serve_app.stack.ports import pick_free

COMP_AI = Path(sys.executable).parent / "comp-ai"


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("COMP_AI_", "POSTGRES_"))}
    return subprocess.run(
        [str(COMP_AI), *arguments],
        env=clean | environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def one_line(done: subprocess.CompletedProcess[str], code: int) -> str:
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("comp-ai: ")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_help_names_every_command() -> None:
    text = run("--help").stdout
    for command in ("up", "status", "migrate", "token", "keys", "model", "audit"):
        assert command in text


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, serve_app.cli.app\n"
        "print([m for m in ('httpx', 'asyncpg', 'pydantic', 'fastapi') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_missing_library_is_one_line(tmp_path: Path) -> None:
    # As where the extra `local` was not installed.
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['psutil'] = None\n")
    done = run("up", PYTHONPATH=str(tmp_path))
    assert "psutil" in one_line(done, 2)


def test_an_unknown_command_is_a_wrong_use() -> None:
    assert run("ups").returncode == 2


def test_a_bad_setting_is_one_line() -> None:
    assert "COMP_AI_PORT" in one_line(run("up", COMP_AI_PORT="x"), 2)


def test_a_taken_port_is_one_line_and_starts_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run("up", COMP_AI_HOME=str(tmp_path / "h"), COMP_AI_HTTP_PORT=port)
    assert "COMP_AI_HTTP_PORT" in one_line(done, 2)
    assert not (tmp_path / "h" / "postgres").exists()


def test_a_missing_config_is_one_line(tmp_path: Path) -> None:
    done = run("up", "--config", str(tmp_path / "no.yaml"), COMP_AI_HOME=str(tmp_path / "h"))
    assert "--config" in one_line(done, 2)


def test_status_of_nothing_is_not_ready(tmp_path: Path) -> None:
    ports = [str(port) for port in pick_free(3)]
    done = run(
        "status",
        "--json",
        COMP_AI_HOME=str(tmp_path),
        COMP_AI_PORT=ports[0],
        COMP_AI_HTTP_PORT=ports[1],
        COMP_AI_DASHBOARD_PORT=ports[2],
    )
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert (found["ready"], found["up_pid"], found["nginx"]) == (False, None, False)


@pytest.mark.parametrize("command", [("migrate",), ("keys", "list")])
def test_an_unprepared_database_is_one_line(tmp_path: Path, command: tuple[str, ...]) -> None:
    one_line(run(*command, COMP_AI_HOME=str(tmp_path)), 2)


def test_a_database_that_is_away_is_one_line() -> None:
    port = str(pick_free(1)[0])
    one_line(run("migrate", "--plan", POSTGRES_HOST="127.0.0.1", POSTGRES_PORT=port), 1)


def test_a_wrong_permission_names_the_right_ones(tmp_path: Path) -> None:
    done = run("keys", "create", "n", "--owner", "o", "--permission", "root", POSTGRES_HOST="h")
    assert "comp-ai:admin" in one_line(done, 2)


def test_a_token_before_the_first_start_is_one_line(tmp_path: Path) -> None:
    assert "comp-ai up" in one_line(run("token", COMP_AI_HOME=str(tmp_path / "none")), 2)


def test_a_token_of_the_local_issuer(tmp_path: Path) -> None:
    (tmp_path / "issuer").mkdir()
    done = run(
        "token", "--subject", "me", "--role", "comp-ai:admin", COMP_AI_HOME=str(tmp_path),
        COMP_AI_ISSUER_PORT="3999",
    )  # fmt: skip
    claims = jwt.decode(done.stdout.strip(), options={"verify_signature": False})
    assert (claims["sub"], claims["iss"]) == ("me", "http://127.0.0.1:3999")
    assert claims["realm_access"]["roles"] == ["comp-ai:admin"]


def test_a_foreign_issuer_needs_our_secret() -> None:
    done = run("token", COMP_AI_OIDC_ISSUER="http://127.0.0.1:1/realm")
    assert "COMP_AI_KEYCLOAK_CLIENT_SECRET" in one_line(done, 2)
