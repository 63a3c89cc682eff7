"""All of one person's rows as JSON Lines, over HTTP and at the command line, for administrators."""

from __future__ import annotations

import base64
import json
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import quote

import asyncpg
import httpx

from serve_app.accounts.sealing.subject_keys import SubjectKeys
from serve_app.database import connect
from serve_app.identity.permission import Permission
from serve_app.settings import PostgresSettings
from serve_app.subjects import report
from serve_app.subjects.exporting import export
from tests.integration.command_line import comp_ai
from tests.integration.fakes import FakeAuthenticator, principal, world
from tests.integration.people import marker, plant, record, write
from tests.sealing import MASTERS

ANN = "ann:müller/x"
AT = f"/admin/subjects/{quote(ANN, safe='')}"
ADMIN = {"Authorization": "Bearer admin"}
KINDS = {
    "subject": 1, "api_key": 1, "request": 3, "response": 1, "idempotency_answer": 1, "file": 1,
    "file_chunk": 1, "batch": 1, "batch_line": 1, "usage_pending": 3, "usage_minute": 1,
    "usage_hour": 1, "usage_day": 1, "limit_usage": 3, "audit": 1, "end": 1,
}  # fmt: skip


def _admins() -> FakeAuthenticator:
    authenticator = FakeAuthenticator()
    authenticator.principals["admin"] = principal("root", permissions=frozenset({Permission.ADMIN}))
    return authenticator


def kinds(text: str) -> dict[str, int]:
    return dict(Counter(json.loads(line)["kind"] for line in text.splitlines()))


async def test_an_export_holds_all_of_one_person_and_of_nobody_else(
    database: PostgresSettings, connection: asyncpg.Connection
) -> None:
    await plant(connection, ANN)
    await plant(connection, "ben")
    async with (
        world(database=database, authenticator=_admins()) as of,
        httpx.AsyncClient(base_url=of.url, headers=ADMIN) as http,
    ):
        answer = await http.post(f"{AT}/export")
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/x-ndjson"
        refused = await http.post(f"{AT}/export?all=1")
        assert refused.json()["error"]["code"] == "unsupported_parameter"
    assert kinds(answer.text) == KINDS
    assert "SECRET-OF-ben" not in answer.text
    assert "secret_hash" not in answer.text
    lines = [json.loads(line) for line in answer.text.splitlines()]
    texts = [line.get("request_text") for line in lines if line["kind"] == "request"]
    assert set(texts) == {f"{marker(ANN)} ask", marker(ANN)}
    assert lines[-1] == {"kind": "end", "lines": len(lines) - 1}
    acts = await connection.fetch(
        "select actor_id, target from comp_ai.audit_log where action = 'subject.export'"
    )
    assert [tuple(act) for act in acts] == [("root", ANN)]


async def test_erase_hold_and_release_over_http(
    database: PostgresSettings, connection: asyncpg.Connection
) -> None:
    await plant(connection, ANN)
    async with (
        world(database=database, authenticator=_admins()) as of,
        httpx.AsyncClient(base_url=of.url, headers=ADMIN) as http,
    ):
        counted = (await http.post(f"{AT}/erase?dry_run=true")).json()
        assert counted["found"]["requests"] == 3
        assert (await http.post(f"{AT}/hold", json={})).status_code == 400
        held = await http.post(f"{AT}/hold", json={"reason": "a case"})
        assert (held.status_code, held.json()["subject"]) == (200, ANN)
        refused = await http.post(f"{AT}/erase")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "legal_hold")
        holds = (await http.get("/admin/holds")).json()["data"]
        assert [hold["reason"] for hold in holds] == ["a case"]
        assert (await http.post(f"{AT}/release")).json()["released_by"] == "root"
        assert (await http.post(f"{AT}/release")).status_code == 404
        assert len((await http.get("/admin/holds?released=true")).json()["data"]) == 2
        erased = await http.post(f"{AT}/erase")
        assert erased.status_code == 200
        assert report.verify(erased.content, MASTERS)["subject"] == ANN
        assert kinds((await http.post(f"{AT}/export")).text) == {
            "subject": 1, "audit": 1, "end": 1,
        }  # fmt: skip


async def test_only_administrators_may(database: PostgresSettings) -> None:
    async with (
        world(database=database) as of,
        httpx.AsyncClient(base_url=of.url, headers={"Authorization": "Bearer user"}) as http,
    ):
        of.authenticator.principals["user"] = principal("eve")
        for step in ("export", "erase", "hold", "release"):
            refused = await http.post(f"{AT}/{step}", json={"reason": "x"})
            assert refused.status_code == 403
        assert (await http.get("/admin/holds")).status_code == 403


async def test_the_commands(
    database: PostgresSettings, connection: asyncpg.Connection, tmp_path: Path
) -> None:
    async def run(*arguments: str) -> Any:
        return comp_ai(database, "subject", *arguments, COMP_AI_MASTER_KEY=key)

    key = _master_key()
    await write(connection, record(ANN, request_body=None, response_text=None))
    assert (await run("hold", ANN, "--reason", "a case")).returncode == 0
    assert json.loads((await run("holds", "--json")).stdout)[0]["subject"] == ANN
    refused = await run("erase", ANN)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "legal hold" in refused.stderr
    assert (await run("release", ANN)).returncode == 0
    exported = await run("export", ANN)
    assert kinds(exported.stdout)["request"] == 1
    counted = json.loads((await run("erase", ANN, "--dry-run", "--json")).stdout)
    assert counted["found"]["requests"] == 1
    file = tmp_path / "report.json"
    assert (await run("erase", ANN, "--output", str(file))).returncode == 0
    good = await run("verify", str(file))
    assert (good.returncode, "unchanged" in good.stdout) == (0, True)
    file.write_text(file.read_text().replace("müller", "meier"))
    assert (await run("verify", str(file))).returncode == 1
    own = "select count(*) from comp_ai.requests where principal_id = $1"
    assert await connection.fetchval(own, ANN) == 0


def _master_key() -> str:
    [key] = MASTERS._keys.values()
    return base64.b64encode(key).decode()


async def test_an_export_is_of_one_moment(
    database: PostgresSettings, connection: asyncpg.Connection
) -> None:
    await write(connection, *(record(ANN) for _ in range(40)))
    other = await connect(database, application_name="tests")
    lines = []
    async for line in export(other, ANN, SubjectKeys(MASTERS)):
        lines.append(json.loads(line))
        if len(lines) == 5:
            await write(connection, record(ANN))
            await connection.execute("delete from comp_ai.request_bodies")
    await other.close()
    requests = [line for line in lines if line["kind"] == "request"]
    assert [one["request_text"] for one in requests] == [f"{marker(ANN)} ask"] * 40
