"""The script that makes our clients in a realm of Keycloak; a real one where there is one."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from serve_app.identity.token_client import fetch_token, find_token_endpoint
from tests.integration.fake_keycloak import ADMIN, FakeKeycloak, running_keycloak
from tests.integration.fakes import signed_in_by

FOLDER = Path(__file__).parents[2] / "k8s-free-compose" / "keycloak"
SCRIPT = FOLDER / "create-comp-ai-keycloak-client.sh"
REALM = FOLDER / "realm" / "comp-ai.json"
PUBLIC_URL = "https://comp-ai.example.com"
SERVICE, BROWSER = "comp-ai-service", "comp-ai-browser"


@pytest.fixture
def keycloak() -> Iterator[FakeKeycloak]:
    with running_keycloak() as fake:
        yield fake


def run_script(url: str, *options: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": os.environ["PATH"],
        "KEYCLOAK_URL": url,
        "KEYCLOAK_ADMIN": ADMIN[0],
        "KEYCLOAK_ADMIN_PASSWORD": ADMIN[1],
        "COMP_AI_PUBLIC_URL": PUBLIC_URL,
    }
    return subprocess.run(
        [SCRIPT, *options],
        env=environment | settings,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
        check=False,
    )


def done(result: subprocess.CompletedProcess[str]) -> str:
    """Return what a run that went well printed."""
    assert result.returncode == 0, result.stderr
    return result.stdout


def secrets_of(keycloak: FakeKeycloak) -> list[str]:
    return [str(client["secret"]) for client in keycloak.clients.values()]


def test_clients_are_made_and_a_second_run_changes_nothing(keycloak: FakeKeycloak) -> None:
    printed = done(run_script(keycloak.url))
    service, browser = keycloak.client(SERVICE), keycloak.client(BROWSER)
    assert printed.splitlines() == [
        f"COMP_AI_KEYCLOAK_CLIENT_SECRET={service['secret']}",
        f"# secret of {BROWSER}",
        browser["secret"],
    ]
    assert (service["serviceAccountsEnabled"], service["standardFlowEnabled"]) == (True, False)
    assert browser["redirectUris"] == [f"{PUBLIC_URL}/oauth2/callback"]
    assert browser["attributes"]["pkce.code.challenge.method"] == "S256"
    assert {role["name"] for role in keycloak.roles[service["id"]]} == {
        "comp-ai:user",
        "comp-ai:admin",
        "comp-ai:auditor",
    }
    for client in (service, browser):
        [audience] = [
            mapper
            for mapper in keycloak.mappers[client["id"]]
            if mapper["protocolMapper"] == "oidc-audience-mapper"
        ]
        assert audience["config"]["included.client.audience"] == SERVICE
    assert keycloak.names_given(f"service-account-{SERVICE}") == {"comp-ai:user"}
    assert keycloak.names_given(browser["id"]) == {
        "comp-ai:user",
        "comp-ai:admin",
        "comp-ai:auditor",
    }
    made = len(keycloak.writes)
    again = run_script(keycloak.url)
    assert done(again) == ""
    assert keycloak.writes[made:] == []
    assert not [secret for secret in secrets_of(keycloak) if secret in again.stderr]


def test_what_was_changed_or_lost_is_put_right(keycloak: FakeKeycloak) -> None:
    done(run_script(keycloak.url))
    browser, service = keycloak.client(BROWSER), keycloak.client(SERVICE)
    kept = secrets_of(keycloak)
    browser["redirectUris"] = ["*"]
    browser["description"] = "changed"
    browser["theirs"] = "kept"
    keycloak.mappers[browser["id"]][0]["config"]["included.client.audience"] = "other"
    del keycloak.mappers[service["id"]][0]
    del keycloak.roles[service["id"]][1]
    keycloak.given.clear()
    made = len(keycloak.writes)
    assert done(run_script(keycloak.url)) == ""
    assert browser["redirectUris"] == [f"{PUBLIC_URL}/oauth2/callback"]
    assert browser["theirs"] == "kept"
    for client in (service, browser):
        kinds = {mapper["protocolMapper"] for mapper in keycloak.mappers[client["id"]]}
        assert "oidc-audience-mapper" in kinds
    assert keycloak.mappers[browser["id"]][0]["config"]["included.client.audience"] == SERVICE
    assert len(keycloak.roles[service["id"]]) == 3
    assert keycloak.names_given(f"service-account-{SERVICE}") == {"comp-ai:user"}
    assert secrets_of(keycloak) == kept
    assert len(keycloak.writes) == made + 6


def test_new_secrets_on_demand(keycloak: FakeKeycloak) -> None:
    done(run_script(keycloak.url))
    old = secrets_of(keycloak)
    printed = done(run_script(keycloak.url, "--new-secret"))
    new = secrets_of(keycloak)
    assert not set(old) & set(new)
    assert all(secret in printed for secret in new)


def test_demo_users_are_switched(keycloak: FakeKeycloak) -> None:
    done(run_script(keycloak.url))
    assert not [name for name in keycloak.users if name.startswith("demo-")]
    done(run_script(keycloak.url, "--demo-users", "off"))
    assert not [name for name in keycloak.users if name.startswith("demo-")]
    printed = done(run_script(keycloak.url, "--demo-users", "on"))
    assert len(keycloak.passwords) == 3
    assert all(password in printed for password in keycloak.passwords.values())
    assert all(len(password) >= 20 for password in keycloak.passwords.values())
    assert keycloak.names_given("demo-user") == {"comp-ai:user"}
    assert keycloak.names_given("demo-admin") == {"comp-ai:user", "comp-ai:admin"}
    assert keycloak.names_given("demo-auditor") == {"comp-ai:auditor"}
    assert {one["enabled"] for one in keycloak.users.values()} == {True}
    done(run_script(keycloak.url, "--demo-users", "off"))
    demo = [one for one in keycloak.users.values() if one["username"].startswith("demo-")]
    assert [one["enabled"] for one in demo] == [False] * 3


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        (["--secret"], {}, "unknown option --secret; allowed: --new-secret"),
        (["--demo-users", "yes"], {}, "--demo-users is 'yes'; allowed: on, off"),
        ([], {"KEYCLOAK_URL": ""}, "KEYCLOAK_URL: is the base URL"),
        ([], {"COMP_AI_PUBLIC_URL": ""}, "COMP_AI_PUBLIC_URL: is the public address"),
        ([], {"KEYCLOAK_ADMIN_PASSWORD": "wrong"}, "does not let admin in"),
        ([], {"KEYCLOAK_REALM": "nowhere"}, "GET /clients?clientId=comp-ai-service failed"),
    ],
)
def test_mistakes_stop_it(
    options: list[str], settings: dict[str, str], message: str, keycloak: FakeKeycloak
) -> None:
    result = run_script(keycloak.url, *options, **settings)
    assert result.returncode != 0
    assert message in result.stderr
    assert "wrong" not in result.stdout + result.stderr
    assert keycloak.writes == []


# A real one. No package index carries Keycloak, so it must be brought:
#
#   docker run -p 8090:8080 -e KC_BOOTSTRAP_ADMIN_USERNAME=admin \
#     -e KC_BOOTSTRAP_ADMIN_PASSWORD=admin quay.io/keycloak/keycloak:26.4 start-dev

REAL = os.environ.get("TEST_KEYCLOAK_URL", "")
NEEDS_KEYCLOAK = pytest.mark.skipif(
    not REAL, reason="needs a real Keycloak: set TEST_KEYCLOAK_URL (see README.md)"
)


def real_realm(name: str) -> dict[str, Any]:
    text = REALM.read_text(encoding="utf-8").replace("${COMP_AI_PUBLIC_URL}", PUBLIC_URL)
    return {**orjson.loads(text), "realm": name}


@pytest.fixture
async def realm() -> Any:
    """A realm of the real Keycloak, imported from our file."""
    name = f"comp-ai-{uuid.uuid4().hex[:8]}"
    admin = {
        "grant_type": "password",
        "client_id": "admin-cli",
        "username": os.environ.get("TEST_KEYCLOAK_ADMIN", "admin"),
        "password": os.environ.get("TEST_KEYCLOAK_ADMIN_PASSWORD", "admin"),
    }
    async with httpx.AsyncClient(base_url=REAL, timeout=60) as http:

        async def headers() -> dict[str, str]:
            answer = await http.post("/realms/master/protocol/openid-connect/token", data=admin)
            return {"Authorization": f"Bearer {answer.json()['access_token']}"}

        made = await http.post("/admin/realms", json=real_realm(name), headers=await headers())
        assert made.status_code == 201, made.text
        yield name
        await http.delete(f"/admin/realms/{name}", headers=await headers())


@NEEDS_KEYCLOAK
async def test_real_keycloak_knows_our_realm_and_our_script(realm: str) -> None:
    settings = {
        "KEYCLOAK_REALM": realm,
        "KEYCLOAK_ADMIN": os.environ.get("TEST_KEYCLOAK_ADMIN", "admin"),
        "KEYCLOAK_ADMIN_PASSWORD": os.environ.get("TEST_KEYCLOAK_ADMIN_PASSWORD", "admin"),
    }
    printed = done(run_script(REAL, "--new-secret", **settings))
    secret = printed.splitlines()[0].partition("=")[2]
    again = run_script(REAL, **settings)
    assert (done(again), again.stderr) == ("", f"realm {realm}: done\n")
    async with httpx.AsyncClient() as http:
        endpoint = await find_token_endpoint(f"{REAL}/realms/{realm}", http)
        token = await fetch_token(endpoint, SERVICE, secret, http)
    environ = {"POSTGRES_HOST": "127.0.0.1", "POSTGRES_PORT": "9", "KEYCLOAK_URL": REAL}
    async with (
        signed_in_by(environ | {"KEYCLOAK_REALM": realm}) as gateway,
        httpx.AsyncClient(base_url=gateway.url, timeout=20) as http,
    ):
        answer = await http.get("/v1/models", headers={"Authorization": f"Bearer {token}"})
        assert answer.status_code == 200, answer.text
        assert gateway.records[0].principal_kind == "service"
