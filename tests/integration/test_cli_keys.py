"""`comp-ai keys`: the life of a key at the command line, and its rows in the audit log."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from serve_app.database import connect
from serve_app.identity.api_keys import prefix_of
from serve_app.settings import PostgresSettings
from tests.integration.command_line import comp_ai


def run(settings: PostgresSettings, *arguments: str) -> str:
    done = comp_ai(settings, "keys", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def listed(settings: PostgresSettings) -> dict[str, Any]:
    [key] = json.loads(run(settings, "list", "--json"))
    assert isinstance(key, dict)
    return key


async def _acts(settings: PostgresSettings) -> list[tuple[str, str, str]]:
    connection = await connect(settings, application_name="tests")
    rows = await connection.fetch(
        "select action, actor_kind, target from comp_ai.audit_log order by seq"
    )
    await connection.close()
    return [tuple(row) for row in rows]


def test_the_life_of_a_key(database: PostgresSettings) -> None:
    first = run(database, "create", "report", "--owner", "ada", "--model", "small").strip()
    made = listed(database)
    assert (made["name"], made["owner"], made["models"]) == ("report", "ada", ["small"])
    assert made["prefix"] == prefix_of(first)

    limits = {"requests_per_minute": 5}
    options = ("--note", "asked for by Ada", "--limits", json.dumps(limits), "--clear", "models")
    run(database, "update", made["id"], *options, "--expires-in-days", "1")
    changed = listed(database)
    assert (changed["note"], changed["limits"]) == ("asked for by Ada", limits)
    assert (changed["name"], changed["models"]) == ("report", None)
    assert changed["expires_at"] > made["created_at"]

    rotated = json.loads(run(database, "rotate", made["prefix"], "--overlap-s", "60", "--json"))
    assert rotated["id"] == made["id"]
    assert listed(database)["earlier_secrets"][0]["prefix"] == made["prefix"]

    # By a secret that the key had before, too.
    run(database, "revoke", made["prefix"])
    assert listed(database)["status"] == "revoked"
    acts = asyncio.run(_acts(database))
    steps = ("create", "update", "rotate", "revoke")
    assert acts == [(f"key.{step}", "operator", made["id"]) for step in steps]


def test_what_is_wrong_is_one_line(database: PostgresSettings) -> None:
    wrong = {
        ("revoke", "nobody"): (1, "nobody"),
        ("rotate", "nobody", "--overlap-s", "1"): (1, "nobody"),
        ("update", "nobody", "--clear", "name"): (2, "--clear"),
        ("update", "nobody", "--limits", "{"): (2, "--limits"),
        ("update", "nobody", "--limits", '{"wishes": 3}'): (2, "--limits.wishes"),
        ("create", "", "--owner", "ada"): (1, "printable"),
    }
    for arguments, (code, said) in wrong.items():
        done = comp_ai(database, "keys", *arguments)
        assert done.returncode == code, (arguments, done.stderr)
        assert said in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
