"""How pg_dump is told where to connect."""

from __future__ import annotations

import ssl

import certifi
import pytest

from serve_app.backup.programs import libpq_environment
from serve_app.settings import load_settings


def environment(**given: str) -> dict[str, str]:
    return libpq_environment(load_settings(given).postgres)


def test_the_password_is_in_the_environment_alone() -> None:
    found = environment(POSTGRES_HOST="db", POSTGRES_PASSWORD="hunter2")
    assert {name for name, value in found.items() if "hunter2" in value} == {"PGPASSWORD"}
    assert (found["PGHOST"], found["PGSSLMODE"]) == ("db", "prefer")
    assert "PGSSLROOTCERT" not in found


def test_a_socket_is_not_encrypted() -> None:
    assert environment(POSTGRES_HOST="/run/x", POSTGRES_SSLMODE="require")["PGSSLMODE"] == "disable"


@pytest.mark.parametrize("mode", ["verify-ca", "verify-full"])
def test_a_verified_server_is_held_against_the_same_authorities(mode: str) -> None:
    given = {"POSTGRES_SSLMODE": mode, "POSTGRES_SSLROOTCERT": certifi.where()}
    assert environment(**given)["PGSSLROOTCERT"] == certifi.where()


def test_a_folder_of_authorities_is_named_by_libpqs_word(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = ssl.get_default_verify_paths()._replace(cafile=None)
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: paths)
    assert environment(POSTGRES_SSLMODE="verify-full")["PGSSLROOTCERT"] == "system"
    # libpq refuses the word with a weaker mode.
    assert "PGSSLROOTCERT" not in environment(POSTGRES_SSLMODE="verify-ca")
