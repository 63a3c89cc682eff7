"""API keys that ended long ago go; what they made stays, and what is still of use."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from pathlib import Path

import asyncpg
import pytest

from serve_app.audit.act import Actor
from serve_app.audit.verify import verify
from serve_app.cli.retention import read_kept
from serve_app.database import connect
from serve_app.errors import ConfigError
from serve_app.identity.api_keys import ApiKeyStore, KeyTerms
from serve_app.identity.authenticator import build_pool
from serve_app.identity.key_sweep import key_sweep_task
from serve_app.records import new_id, utc_now
from serve_app.settings import PostgresSettings
from serve_app.subjects.holds import set_hold
from tests.integration.command_line import comp_ai

ROOT = Actor(id="root", kind="operator")
DAYS = 30
RECENT, LONG_AGO = timedelta(days=29), timedelta(days=31)


class Counted:
    """How many rows went."""

    rows = 0

    def ended_keys_removed(self, rows: int) -> None:
        self.rows += rows


@pytest.fixture
async def store(database: PostgresSettings) -> AsyncIterator[ApiKeyStore]:
    pool = build_pool(database)
    yield ApiKeyStore(pool)
    await pool.close()


@pytest.fixture
async def connection(database: PostgresSettings) -> AsyncIterator[asyncpg.Connection]:
    opened = await connect(database, application_name="tests")
    yield opened
    await opened.close()


async def made(
    store: ApiKeyStore,
    connection: asyncpg.Connection,
    name: str,
    *,
    owner: str = "ada",
    revoked_at: datetime | None = None,
    expires_at: datetime | None = None,
) -> None:
    _, key = await store.create(KeyTerms(name=name), owner=owner, by=ROOT)
    await connection.execute(
        "update comp_ai.api_keys set revoked_at = $2, expires_at = $3 where id = $1",
        key.id,
        revoked_at,
        expires_at,
    )


async def left(connection: asyncpg.Connection) -> set[str]:
    return {row["name"] for row in await connection.fetch("select name from comp_ai.api_keys")}


async def sweep(connection: asyncpg.Connection) -> int:
    counted = Counted()
    await key_sweep_task(DAYS, counted).run(connection)
    return counted.rows


async def test_keys_go_some_time_after_they_ended(
    store: ApiKeyStore, connection: asyncpg.Connection
) -> None:
    now = utc_now()
    await made(store, connection, "in use")
    await made(store, connection, "expires", expires_at=now + timedelta(days=1))
    await made(store, connection, "expired", expires_at=now - RECENT)
    await made(store, connection, "revoked", revoked_at=now - RECENT)
    await made(store, connection, "long expired", expires_at=now - LONG_AGO)
    await made(store, connection, "long revoked", revoked_at=now - LONG_AGO)
    later = now + timedelta(days=1)
    await made(store, connection, "long revoked too", revoked_at=now - LONG_AGO, expires_at=later)
    assert await sweep(connection) == 3
    assert await left(connection) == {"in use", "expires", "expired", "revoked"}
    assert await sweep(connection) == 0
    acts = await connection.fetch(
        "select after from comp_ai.audit_log where action = 'retention.drop'"
    )
    assert len(acts) == 1
    assert json.loads(acts[0]["after"])["rows"] == 3
    assert (await verify(connection)).intact


async def test_earlier_secrets_go_and_their_key_stays(
    store: ApiKeyStore, connection: asyncpg.Connection
) -> None:
    _, key = await store.create(KeyTerms(name="rotated"), owner="ada", by=ROOT)
    plain, _ = await store.rotate(key.id, overlap=timedelta(hours=1), by=ROOT)
    assert plain
    await connection.execute(
        "update comp_ai.api_keys set expires_at = $1 where replaced_by is not null",
        utc_now() - LONG_AGO,
    )
    assert await sweep(connection) == 1
    assert (await store.get(key.id)).terms.name == "rotated"


async def test_keys_of_a_subject_under_a_hold_stay(
    store: ApiKeyStore, connection: asyncpg.Connection
) -> None:
    await made(store, connection, "held", revoked_at=utc_now() - LONG_AGO)
    await connection.execute(
        "insert into comp_ai.legal_holds (id, subject, reason, set_by) "
        "values ($1, 'ada', 'a case', 'root')",
        new_id(),
    )
    assert await sweep(connection) == 0
    await connection.execute(
        "update comp_ai.legal_holds set released_at = now(), released_by = 'root'"
    )
    assert await sweep(connection) == 1


async def test_the_command_shows_them_and_removes_them_when_told(
    store: ApiKeyStore, connection: asyncpg.Connection, database: PostgresSettings, tmp_path: Path
) -> None:
    await made(store, connection, "in use")
    await made(store, connection, "gone", revoked_at=utc_now() - LONG_AGO)
    await made(store, connection, "held", owner="ben", revoked_at=utc_now() - LONG_AGO)
    await set_hold(connection, "ben", "a case", ROOT)
    config = tmp_path / "config.yaml"
    config.write_text("applications: [{args: {request_log: {ended_keys_days: 30}}}]")
    asked = ("retention", "--config", str(config), "--json")
    looked = await asyncio.to_thread(comp_ai, database, *asked)
    assert json.loads(looked.stdout)["ended_keys"] == {"rows": 1, "held_rows": 1}
    assert await left(connection) == {"in use", "gone", "held"}
    done = await asyncio.to_thread(comp_ai, database, *asked, "--apply")
    assert json.loads(done.stdout)["ended_keys"] == {"rows": 1, "held_rows": 1}
    assert await left(connection) == {"in use", "held"}
    actors = "select distinct actor_kind from comp_ai.audit_log where action = 'retention.drop'"
    assert [row["actor_kind"] for row in await connection.fetch(actors)] == ["operator"]


@pytest.mark.parametrize(("options", "days"), [("{}", 400), ("{ended_keys_days: null}", None)])
def test_how_long_the_command_takes_keys_to_be_kept(
    tmp_path: Path, options: str, days: int | None
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"applications: [{{name: a-model}}, {{args: {{request_log: {options}}}}}]")
    assert read_kept(config).ended_keys_days == days


@pytest.mark.parametrize("value", ["0", "36501", "soon", "true"])
def test_a_wrong_number_of_days_is_named(tmp_path: Path, value: str) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"applications: [{{args: {{request_log: {{ended_keys_days: {value}}}}}}}]")
    with pytest.raises(ConfigError, match=r"request_log\.ended_keys_days"):
        read_kept(config)
