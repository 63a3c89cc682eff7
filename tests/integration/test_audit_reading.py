"""Reading the audit log: by HTTP as an auditor, and by the command line as an operator."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest

from serve_app.audit.act import Actor, AuditAct
from serve_app.audit.log import AuditLog
from serve_app.database import connect
from serve_app.identity.principal import Permission
from serve_app.settings import PostgresSettings
from tests.integration.conftest import PostgresServer
from tests.integration.fakes import World, client, principal, world

COMP_AI = Path(sys.executable).parent / "comp-ai"
START = datetime(2026, 3, 1, 12, tzinfo=UTC)
AUDITOR, ADMIN = "key-of-an-auditor", "key-of-an-admin"
ROWS = 7


def act(number: int) -> AuditAct:
    """Return one of `ROWS` acts, an hour apart; ann and bob take turns."""
    return AuditAct(
        actor=Actor(id="bob" if number % 2 else "ann", kind="user", client_address="192.0.2.7"),
        action="key.create" if number < 5 else "key.revoke",
        target=f"key-{number}",
        before=None if number < 5 else {"limits": {"requests_per_minute": 5}, "note": "x"},
        after={"limits": {"requests_per_minute": number}},
        at=START + timedelta(hours=number),
    )


@pytest.fixture
async def filled(connection: asyncpg.Connection) -> None:
    async with connection.transaction():
        await AuditLog().append_all(connection, [act(number) for number in range(ROWS)])


@pytest.fixture
async def served(database: PostgresSettings, filled: None) -> AsyncIterator[World]:
    async with world(database=database) as made:
        made.authenticator.principals |= {
            AUDITOR: principal("eva", permissions=frozenset({Permission.AUDITOR})),
            ADMIN: principal("adam", permissions=frozenset({Permission.ADMIN})),
        }
        yield made


@pytest.fixture
async def http(served: World) -> AsyncIterator[httpx.AsyncClient]:
    async with client(served) as opened:
        opened.headers["authorization"] = f"Bearer {AUDITOR}"
        yield opened


async def targets(http: httpx.AsyncClient, **query: Any) -> list[str]:
    response = await http.get("/admin/audit", params=query)
    assert response.status_code == 200, response.text
    return [row["target"].removeprefix("key-") for row in response.json()["data"]]


async def test_an_auditor_reads_the_newest_first(http: httpx.AsyncClient) -> None:
    listed = (await http.get("/admin/audit")).json()
    assert (listed["object"], listed["has_more"], listed["first_id"]) == ("list", False, "7")
    newest = listed["data"][0]
    assert newest["object"] == "audit.entry"
    assert newest["actor"] == {"id": "ann", "kind": "user", "api_key_id": None}
    assert (newest["at"], newest["action"]) == ("2026-03-01T18:00:00.000000+00:00", "key.revoke")
    assert (newest["client_address"], newest["request_id"]) == ("192.0.2.7", None)
    assert newest["after"] == {"limits": {"requests_per_minute": 6}}
    assert newest["previous_hash"] == listed["data"][1]["hash"]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({"order": "asc"}, "0123456"),
        ({"actor": "bob"}, "531"),
        ({"actor": "nobody"}, ""),
        ({"action": "key.revoke"}, "65"),
        ({"actor": "ann", "action": "key.create"}, "420"),
        ({"since": "2026-03-01T15:00:00Z"}, "6543"),
        ({"until": "2026-03-01T15:00:00"}, "210"),
        ({"since": "2026-03-01T13:30:00+01:00", "until": "2026-03-01T14:00:01Z"}, "21"),
        ({"since": "2026-03-02"}, ""),
    ],
)
async def test_rows_are_found_by_who_what_and_when(
    http: httpx.AsyncClient, query: dict[str, str], expected: str
) -> None:
    assert "".join(await targets(http, **query)) == expected


@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_pages_follow_each_other(http: httpx.AsyncClient, order: str) -> None:
    seen: list[str] = []
    query: dict[str, Any] = {"limit": 3, "order": order}
    for more in (True, True, False):
        page = (await http.get("/admin/audit", params=query)).json()
        seen += [row["id"] for row in page["data"]]
        assert page["has_more"] is more
        query["after"] = page["last_id"]
    expected = [str(number) for number in range(1, ROWS + 1)]
    assert seen == (expected if order == "asc" else expected[::-1])


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("since=yesterday", "since"),
        ("until=2026-13-01", "until"),
        ("since=0001-01-01T00:00:00%2B14:00", "since"),
        ("after=x", "after"),
        ("after=99999999999999999999", "after"),
        ("actor=a%00b", "actor"),
        ("limit=1001", "limit"),
        ("who=ann", "who"),
    ],
)
async def test_wrong_queries_are_refused_by_name(
    http: httpx.AsyncClient, query: str, param: str
) -> None:
    response = await http.get(f"/admin/audit?{query}")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(("key", "status"), [(AUDITOR, 200), (ADMIN, 200), ("user", 403)])
async def test_auditors_and_admins_read_and_nobody_else(
    served: World, http: httpx.AsyncClient, key: str, status: int
) -> None:
    served.authenticator.principals["user"] = principal("ann")
    response = await http.get("/admin/audit", headers={"authorization": f"Bearer {key}"})
    assert response.status_code == status
    await served.quiet()
    denied = None if status == 200 else "comp-ai:auditor"
    assert (served.records[0].route, served.records[0].denied) == ("admin.audit", denied)


async def test_an_auditor_is_no_user(http: httpx.AsyncClient) -> None:
    assert (await http.get("/v1/models")).status_code == 403


async def test_without_postgresql_it_is_unavailable() -> None:
    async with world() as served, client(served) as http:
        served.authenticator.principals[AUDITOR] = principal(
            "eva", permissions=frozenset({Permission.AUDITOR})
        )
        response = await http.get("/admin/audit", headers={"authorization": f"Bearer {AUDITOR}"})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "store_unavailable"


async def test_a_page_by_actor_uses_its_index(connection: asyncpg.Connection) -> None:
    acts = [AuditAct(actor=Actor(id=f"p{n % 500}", kind="user"), action="x") for n in range(5000)]
    async with connection.transaction():
        await AuditLog().append_all(connection, acts)
    await connection.execute("analyze comp_ai.audit_log")
    explained = await connection.fetch(
        "explain select * from comp_ai.audit_log where actor_id = 'p7' order by seq desc limit 50"
    )
    assert "audit_log_by_actor" in "\n".join(row[0] for row in explained)


# The command line.


@dataclass(frozen=True)
class Done:
    """What a command answered."""

    code: int
    out: str
    err: str


async def comp_ai(postgres: PostgresSettings, *arguments: str) -> Done:
    assert postgres.password is not None
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("COMP_AI_", "POSTGRES_"))}
    process = await asyncio.create_subprocess_exec(
        str(COMP_AI),
        *arguments,
        env={
            **clean,
            "POSTGRES_HOST": postgres.host,
            "POSTGRES_PORT": str(postgres.port),
            "POSTGRES_USER": postgres.user,
            "POSTGRES_DB": postgres.database,
            "POSTGRES_PASSWORD": postgres.password.get_secret_value(),
            "COLUMNS": "250",
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return Done(process.returncode, out.decode(), err.decode())


async def test_the_list_for_people_says_what_changed(
    database: PostgresSettings, filled: None
) -> None:
    done = await comp_ai(database, "audit", "list", "--action", "key.revoke", "--limit", "1")
    assert done.code == 0, done.err
    (line,) = [line for line in done.out.splitlines() if "key-6" in line]
    assert "2026-03-01 18:00:00" in line
    assert "ann (user)" in line
    assert 'limits.requests_per_minute: 5 → 6; note: "x" → gone' in line


async def test_the_list_for_programs_can_be_filtered(
    database: PostgresSettings, filled: None
) -> None:
    done = await comp_ai(
        database, *"audit list --json --actor bob --since 2026-03-01T14:00:00Z".split()
    )
    assert [row["target"] for row in json.loads(done.out)] == ["key-3", "key-5"]
    wrong = await comp_ai(database, "audit", "list", "--until", "noon")
    assert (wrong.code, wrong.out) == (2, "")
    assert wrong.err.startswith("comp-ai: --until is 'noon'; allowed: a time")


async def test_a_terminal_does_not_obey_what_is_in_the_log(
    database: PostgresSettings, connection: asyncpg.Connection
) -> None:
    evil = AuditAct(actor=Actor(id="\x1b]0;x\x07[red]a", kind="user"), action="x")
    async with connection.transaction():
        await AuditLog().append(connection, evil)
    done = await comp_ai(database, "audit", "list")
    assert "?]0;x?[red]a" in done.out


async def test_verify_says_yes_and_no_by_its_exit_code(
    database: PostgresSettings, filled: None, postgres_server: PostgresServer, tmp_path: Path
) -> None:
    file = tmp_path / "checkpoint.json"
    assert (await comp_ai(database, "audit", "checkpoint", str(file))).code == 0
    good = await comp_ai(database, *f"audit verify --json --checkpoint {file}".split())
    said = json.loads(good.out)
    assert (good.code, said["intact"], said["rows"], said["faults"]) == (0, True, ROWS, [])
    assert said["checkpoint"]["seq"] == said["head"]["seq"] == ROWS
    admin = postgres_server.embedded.admin_settings()
    superuser = await connect(
        admin.model_copy(update={"database": database.database}), application_name="tests"
    )
    await superuser.execute("alter table comp_ai.audit_log disable trigger all")
    await superuser.execute("update comp_ai.audit_log set actor_id = 'mallory' where seq = 3")
    await superuser.close()
    bad = await comp_ai(database, "audit", "verify")
    assert bad.code == 1
    assert bad.out == "row 3: it is not what its hash was made of (changed)\n"
    # No checkpoint is taken of a log that was changed.
    before = file.read_bytes()
    assert (await comp_ai(database, "audit", "checkpoint", str(file))).code == 1
    assert file.read_bytes() == before


async def test_a_log_that_is_shorter_than_its_checkpoint_is_refused(
    database: PostgresSettings, filled: None, tmp_path: Path
) -> None:
    file = tmp_path / "checkpoint.json"
    file.write_text(json.dumps({"seq": ROWS + 1, "hash": "00" * 32, "taken_at": "then"}))
    done = await comp_ai(database, "audit", "verify", "--checkpoint", str(file))
    assert done.code == 1
    assert done.out == f"row {ROWS + 1}: the row of the checkpoint is gone (checkpoint)\n"


@pytest.mark.parametrize("text", ["", "[]", '{"seq": 1}', '{"seq": -1, "hash": "00"}', "\x00"])
async def test_a_file_that_is_no_checkpoint_is_refused(
    database: PostgresSettings, tmp_path: Path, text: str
) -> None:
    file = tmp_path / "checkpoint.json"
    file.write_text(text)
    done = await comp_ai(database, "audit", "verify", "--checkpoint", str(file))
    assert done.code == 2
    assert done.err.startswith("comp-ai: --checkpoint is ")


async def test_without_the_schema_it_says_what_to_do(empty_database: PostgresSettings) -> None:
    done = await comp_ai(empty_database, "audit", "verify")
    assert (done.code, done.out) == (1, "")
    assert done.err == "comp-ai: A table is missing. Run `comp-ai migrate`.\n"


async def test_migrations_are_audited_from_the_log_on(empty_database: PostgresSettings) -> None:
    assert (await comp_ai(empty_database, "migrate")).code == 0
    rows = json.loads((await comp_ai(empty_database, "audit", "list", "--json")).out)
    assert rows[0]["target"] == "0005_audit_log"
    assert {row["action"] for row in rows} == {"schema.migrate"}
    assert {row["actor"]["kind"] for row in rows} == {"operator"}
    assert all(len(row["after"]["sha256"]) == 64 for row in rows)
    assert (await comp_ai(empty_database, "audit", "verify")).code == 0
