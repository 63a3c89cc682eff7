"""The file of further issuers: what is read, and what a mistake is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve_app.errors import ConfigError
from serve_app.settings import load_settings

GOOD = """
issuers:
  - name: partner
    issuer: https://partner.example/
    discovery_url: http://inside:8080/realms/partner
    authorized_parties: [web]
    permissions: ["comp-ai:user", "comp-ai:auditor"]
    introspection: true
    client_secret_env: PARTNER_SECRET
  - name: other
    issuer: https://other.example
"""
FIRST = {"COMP_AI_OIDC_ISSUER": "https://first.example"}


def write(tmp_path: Path, text: str) -> dict[str, str]:
    file = tmp_path / "issuers.yaml"
    file.write_text(text, encoding="utf-8")
    return {"COMP_AI_OIDC_ISSUERS": str(file), "PARTNER_SECRET": "word\n"}


def test_issuers_are_read(tmp_path: Path) -> None:
    partner, other = load_settings(write(tmp_path, GOOD) | FIRST).further_issuers
    assert (partner.entry.name, partner.url) == ("partner", "https://partner.example")
    assert partner.secret is not None
    assert partner.secret.get_secret_value() == "word"
    assert (other.secret, other.entry.permissions) == (None, ("comp-ai:user",))
    assert "word" not in repr(partner)


def test_secret_from_a_file(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("from a file\n")
    text = GOOD.replace("client_secret_env: PARTNER_SECRET", f"client_secret_file: {secret}")
    found = load_settings(write(tmp_path, text)).further_issuers[0].secret
    assert found is not None
    assert found.get_secret_value() == "from a file"


ENTRY = "issuers:\n  - {name: a, issuer: 'https://a.example'"


@pytest.mark.parametrize(
    ("text", "place", "value", "allowed"),
    [
        ("issuers: [", "", "issuers.yaml", "YAML (line 1)"),
        ("- a", "", "issuers.yaml", "a mapping"),
        ("issuers:\n  - {issuer: 'https://a.example'}", "issuers.0.name", "None", "required"),
        ("issuers:\n  - {name: A, issuer: 'https://a.example'}", "issuers.0.name", "A", "pattern"),
        (
            "issuers:\n  - {name: comp-ai, issuer: 'https://a.example'}",
            "issuers.0.name",
            "comp-ai",
            "another name",
        ),
        ("issuers:\n  - {name: a, issuer: nowhere}", "issuers.0.issuer", "nowhere", "URL"),
        (ENTRY + ", audiance: x}", "issuers.0.audiance", "x", "not permitted"),
        (ENTRY + ", client_secret: hush}", "issuers.0.client_secret", "(hidden)", "not permitted"),
        (ENTRY + ", permissions: [root]}", "issuers.0.permissions.0", "root", "comp-ai:user"),
        (ENTRY + ", introspection: true}", "issuers.0", "(hidden)", "client_secret_env"),
        (
            ENTRY + ", introspection: true, client_secret_env: NONE}",
            "a.client_secret_env",
            "NONE",
            "holds a secret",
        ),
        (
            ENTRY + ", introspection: true, client_secret_file: /none}",
            "a.client_secret_file",
            "/none",
            "readable file",
        ),
        (
            ENTRY + "}\n  - {name: a, issuer: 'https://b.example'}",
            "issuers.1.name",
            "a",
            "no other issuer",
        ),
        (
            ENTRY + "}\n  - {name: b, issuer: 'https://a.example/'}",
            "issuers.1.issuer",
            "https://a.example",
            "named once",
        ),
        (
            "issuers:\n  - {name: a, issuer: 'https://first.example'}",
            "issuers.0.issuer",
            "https://first.example",
            "named once",
        ),
    ],
)
def test_mistake_names_setting_value_and_what_is_allowed(
    text: str, place: str, value: str, allowed: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(write(tmp_path, text) | FIRST)
    assert caught.value.setting == ": ".join(filter(None, ["COMP_AI_OIDC_ISSUERS", place]))
    assert str(caught.value.value).endswith(value)
    assert allowed in caught.value.allowed
    assert "hush" not in str(caught.value)


def test_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a readable file"):
        load_settings({"COMP_AI_OIDC_ISSUERS": str(tmp_path / "none")})


def test_only_one_issuer_is_asked_about_opaque_tokens(tmp_path: Path) -> None:
    env = write(tmp_path, GOOD) | FIRST
    env |= {"COMP_AI_OIDC_INTROSPECTION": "true", "COMP_AI_KEYCLOAK_CLIENT_SECRET": "x"}
    with pytest.raises(ConfigError, match="introspection at one issuer only"):
        load_settings(env)


def test_introspection_wants_a_secret() -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(FIRST | {"COMP_AI_OIDC_INTROSPECTION": "true"})
    assert caught.value.setting == "COMP_AI_OIDC_INTROSPECTION"
    assert "COMP_AI_KEYCLOAK_CLIENT_SECRET" in caught.value.allowed
