"""Settings from the environment: what is read, and what a mistake is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve_app.errors import ConfigError
from serve_app.settings import GROUPS, load_settings

KEY = "k" * 32


def test_nothing_set_gives_the_defaults() -> None:
    settings = load_settings({})
    assert settings.service.port == 3002
    assert settings.postgres.password is None
    assert settings.oidc.issuer_url is None
    assert settings.service.home_path == (Path.home() / ".comp-ai").resolve()


def test_empty_variable_is_one_that_is_not_set() -> None:
    assert load_settings({"COMP_AI_PORT": "", "POSTGRES_PASSWORD": ""}) == load_settings({})


def test_process_environment_is_read_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_AI_PORT", "4001")
    assert load_settings().service.port == 4001


def test_variables_of_others_do_no_harm() -> None:
    assert load_settings({"PATH": "/bin", "COMP_AI_UNKNOWN": "x"}) == load_settings({})


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("COMP_AI_PORT", "0", "greater than or equal to 1"),
        ("COMP_AI_PORT", "http", "integer"),
        ("COMP_AI_TEMPERATURE", "3", "less than or equal to 2"),
        ("COMP_AI_MAX_TOKENS", "0", "greater than or equal to 1"),
        ("POSTGRES_PORT", "65536", "less than or equal to 65535"),
        ("POSTGRES_SSLMODE", "maybe", "'disable', 'prefer'"),
        ("COMP_AI_OIDC_ISSUER", "nowhere", "URL"),
    ],
)
def test_mistake_names_setting_value_and_what_is_allowed(
    name: str, value: str, allowed: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings({name: value})
    assert (caught.value.setting, caught.value.value) == (name, value)
    assert allowed in caught.value.allowed


def test_wrong_secret_is_not_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings({"COMP_AI_API_KEY": "too-short"})
    assert caught.value.setting == "COMP_AI_API_KEY"
    assert "too-short" not in str(caught.value)
    assert "32" in caught.value.allowed


def test_secrets_are_hidden_when_shown() -> None:
    env = {
        "COMP_AI_API_KEY": KEY,
        "POSTGRES_PASSWORD": "pw-1",
        "COMP_AI_KEYCLOAK_CLIENT_SECRET": "cs-1",
    }
    settings = load_settings(env)
    shown = f"{settings} {settings!r} {settings.model_dump()} {settings.model_dump_json()}"
    assert not [secret for secret in env.values() if secret in shown]
    assert settings.postgres.password is not None
    assert settings.postgres.password.get_secret_value() == "pw-1"


@pytest.mark.parametrize(
    "name", ["COMP_AI_API_KEY", "POSTGRES_PASSWORD", "COMP_AI_KEYCLOAK_CLIENT_SECRET"]
)
def test_secret_from_a_file(tmp_path: Path, name: str) -> None:
    file = tmp_path / "secret"
    file.write_text(f"{KEY}\n")
    by_file = load_settings({f"{name}_FILE": str(file), name: "x" * 40})
    assert by_file == load_settings({name: KEY})


def test_only_secrets_come_from_files(tmp_path: Path) -> None:
    file = tmp_path / "port"
    file.write_text("4001")
    assert load_settings({"COMP_AI_PORT_FILE": str(file)}).service.port == 3002


def test_secret_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a readable file") as caught:
        load_settings({"POSTGRES_PASSWORD_FILE": str(tmp_path / "none")})
    assert caught.value.setting == "POSTGRES_PASSWORD_FILE"


def test_secret_file_that_is_not_text(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_settings({"POSTGRES_PASSWORD_FILE": str(file)})


@pytest.mark.parametrize(
    ("env", "issuer"),
    [
        ({"KEYCLOAK_URL": "https://id.example/"}, "https://id.example/realms/lianel"),
        (
            {"KEYCLOAK_URL": "https://id.example/auth", "KEYCLOAK_REALM": "team"},
            "https://id.example/auth/realms/team",
        ),
        (
            {"KEYCLOAK_URL": "https://id.example", "COMP_AI_OIDC_ISSUER": "https://other.example/"},
            "https://other.example",
        ),
    ],
)
def test_issuer(env: dict[str, str], issuer: str) -> None:
    assert load_settings(env).oidc.issuer_url == issuer


def test_list_is_split_at_commas() -> None:
    env = {"COMP_AI_OIDC_AUTHORIZED_PARTIES": " web, cli ,,"}
    assert load_settings(env).oidc.authorized_parties == ("web", "cli")


def test_models_folder() -> None:
    assert load_settings({"COMP_AI_HOME": "/data"}).service.models_path == Path("/data/models")
    env = {"COMP_AI_HOME": "/data", "COMP_AI_MODEL_PATH": "/weights"}
    assert load_settings(env).service.models_path == Path("/weights")


@pytest.mark.parametrize("group", GROUPS)
def test_every_setting_says_what_it_is(group: str) -> None:
    assert all(f.alias and f.description for f in GROUPS[group].model_fields.values())
