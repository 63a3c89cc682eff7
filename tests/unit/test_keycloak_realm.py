"""The realm that Keycloak imports: what it must hold, and what it must not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from serve_app.identity.principal import Permission
from serve_app.settings import load_settings

PROJECT = Path(__file__).parents[2]
REALM_TEXT = (PROJECT / "k8s-free-compose/keycloak/realm/comp-ai.json").read_text("utf-8")
REALM: dict[str, Any] = orjson.loads(REALM_TEXT)
CLIENTS = {client["clientId"]: client for client in REALM["clients"]}
SETTINGS = load_settings({}).oidc
SCRIPTS = [
    *(PROJECT / "k8s-free-compose").glob("**/*.sh"),
    *(path for path in (PROJECT / ".ci").iterdir() if path.is_file()),
]


def test_clients_are_those_of_the_settings() -> None:
    assert set(CLIENTS) == {SETTINGS.client_id, "comp-ai-browser"}
    service, browser = CLIENTS[SETTINGS.client_id], CLIENTS["comp-ai-browser"]
    assert (service["serviceAccountsEnabled"], service["standardFlowEnabled"]) == (True, False)
    assert (browser["serviceAccountsEnabled"], browser["standardFlowEnabled"]) == (False, True)
    assert browser["attributes"]["pkce.code.challenge.method"] == "S256"
    for client in CLIENTS.values():
        assert not client["publicClient"]
        assert not client["implicitFlowEnabled"]
        assert not client["directAccessGrantsEnabled"]
        assert not client["fullScopeAllowed"]


@pytest.mark.parametrize("client", CLIENTS)
def test_tokens_hold_what_the_gateway_asks_for(client: str) -> None:
    mappers = {mapper["protocolMapper"]: mapper["config"] for mapper in mappers_of(client)}
    audience = mappers["oidc-audience-mapper"]
    assert audience["included.client.audience"] == SETTINGS.audience
    assert audience["access.token.claim"] == "true"
    # An ID token must not look like an access token for us.
    assert audience["id.token.claim"] == "false"
    roles = mappers["oidc-usermodel-client-role-mapper"]
    assert roles["claim.name"] == f"resource_access.{SETTINGS.client_id}.roles"
    assert mappers["oidc-group-membership-mapper"]["claim.name"] == "groups"


def mappers_of(client: str) -> list[dict[str, Any]]:
    return list(CLIENTS[client]["protocolMappers"])


def test_roles_are_the_permissions() -> None:
    roles = {role["name"] for role in REALM["roles"]["client"][SETTINGS.client_id]}
    # The scope of an API key is nobody's role.
    assert roles == set(Permission) - {Permission.KEYS}
    [scope] = REALM["clientScopeMappings"][SETTINGS.client_id]
    assert (scope["client"], set(scope["roles"])) == ("comp-ai-browser", roles)
    for group in REALM["groups"]:
        assert set(group["clientRoles"][SETTINGS.client_id]) <= roles


def test_service_account_is_a_user_and_no_more() -> None:
    [account] = [user for user in REALM["users"] if "serviceAccountClientId" in user]
    assert account["clientRoles"] == {SETTINGS.client_id: [Permission.USER]}


def test_demo_users_are_off() -> None:
    demo = [user for user in REALM["users"] if user["username"].startswith("demo-")]
    assert len(demo) == 3
    groups = {f"/{group['name']}" for group in REALM["groups"]}
    for user in demo:
        assert user["enabled"] is False
        assert "credentials" not in user
        assert set(user["groups"]) <= groups


def test_guessing_is_slowed_and_tokens_are_short() -> None:
    assert REALM["bruteForceProtected"]
    assert REALM["failureFactor"] <= 10
    assert REALM["accessTokenLifespan"] <= 300
    assert REALM["revokeRefreshToken"]
    assert not REALM["registrationAllowed"]
    assert REALM["sslRequired"] == "external"


def test_no_secret_is_inside() -> None:
    assert not re.search(r'"(secret|credentials|privateKey|value|password)"', REALM_TEXT)


def test_addresses_are_below_the_public_one() -> None:
    urls = re.findall(r'"([^"]*://[^"]*|\$\{[^"]*)"', REALM_TEXT)
    assert urls
    assert all(url.startswith("${COMP_AI_PUBLIC_URL}/") for url in urls)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: str(script.relative_to(PROJECT)))
def test_scripts_are_clean(script: Path) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    result = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
