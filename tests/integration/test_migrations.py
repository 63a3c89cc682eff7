"""The schema: how it comes about, and what it promises to queries."""

from __future__ import annotations

import asyncio
import shutil
from datetime import UTC, datetime
from pathlib import Path

import asyncpg
import pytest

from serve_app.database import (
    DatabaseUnavailable,
    MigrationError,
    connect,
    create_pool,
    migrate,
    plan,
    read_migrations,
)
from serve_app.errors import ConfigError
from serve_app.records import new_id
from serve_app.settings import PostgresSettings

MIGRATIONS = Path(__file__).parents[2] / "migrations"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MIGRATIONS, tmp_path / "migrations"))


async def test_plan_changes_nothing_and_migrate_does_what_it_says(
    empty_database: PostgresSettings,
) -> None:
    everything = read_migrations(MIGRATIONS)
    assert await plan(empty_database, directory=MIGRATIONS) == everything
    assert await plan(empty_database, directory=MIGRATIONS) == everything
    assert await migrate(empty_database, directory=MIGRATIONS) == everything
    assert await migrate(empty_database, directory=MIGRATIONS) == []
    assert await plan(empty_database, directory=MIGRATIONS) == []


async def test_two_runners_at_once_apply_each_migration_once(
    empty_database: PostgresSettings,
) -> None:
    done = await asyncio.gather(*(migrate(empty_database, directory=MIGRATIONS) for _ in range(4)))
    assert sorted(map(len, done)) == [0, 0, 0, len(read_migrations(MIGRATIONS))]


async def test_changed_file_is_refused(database: PostgresSettings, folder: Path) -> None:
    first = folder / "0001_accounts.sql"
    first.write_text(first.read_text() + "\n-- and more\n")
    with pytest.raises(MigrationError, match="0001_accounts was changed after it was applied"):
        await migrate(database, directory=folder)


async def test_failed_migration_is_undone_and_those_before_it_stay(
    database: PostgresSettings, folder: Path
) -> None:
    (folder / "0998_good.sql").write_text("create table comp_ai.good (x int);")
    (folder / "0999_bad.sql").write_text("create table comp_ai.bad (x int); select 1/0;")
    with pytest.raises(MigrationError, match="0999_bad failed and was undone"):
        await migrate(database, directory=folder)
    assert [m.name for m in await plan(database, directory=folder)] == ["bad"]
    connection = await connect(database, application_name="tests")
    assert await connection.fetchval("select to_regclass('comp_ai.bad')") is None
    assert await connection.fetchval("select to_regclass('comp_ai.good')") is not None
    await connection.close()


async def test_previous_release_runs_on_a_newer_schema(
    database: PostgresSettings, folder: Path
) -> None:
    (folder / "0998_newer.sql").write_text("select 1;")
    await migrate(database, directory=folder)
    assert await migrate(database, directory=MIGRATIONS) == []


async def test_late_number_and_lost_file_are_refused(
    database: PostgresSettings, folder: Path
) -> None:
    (folder / "0998_newer.sql").write_text("select 1;")
    await migrate(database, directory=folder)
    (folder / "0997_late.sql").write_text("select 1;")
    with pytest.raises(MigrationError, match="0997_late is older"):
        await migrate(database, directory=folder)
    (folder / "0997_late.sql").unlink()
    (folder / "0001_accounts.sql").unlink()
    with pytest.raises(MigrationError, match="0001_accounts, and its file is gone"):
        await plan(database, directory=folder)


@pytest.mark.parametrize(
    "name", ["1_short.sql", "0001_again.sql", "0002-dash.sql", "0000_zero.sql"]
)
def test_wrong_file_names_are_refused(folder: Path, name: str) -> None:
    (folder / name).write_text("select 1;")
    with pytest.raises(ConfigError, match=name):
        read_migrations(folder)


def test_folder_without_migrations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a folder that holds"):
        read_migrations(tmp_path)


async def test_partitions_can_be_made_twice_at_once(database: PostgresSettings) -> None:
    async def ensure() -> None:
        connection = await connect(database, application_name="tests")
        await connection.execute("select comp_ai.ensure_request_partitions('2031-11-15', 3)")
        await connection.close()

    await asyncio.gather(*(ensure() for _ in range(4)))
    connection = await connect(database, application_name="tests")
    bounds = await connection.fetch(
        "select c.relname, pg_get_expr(c.relpartbound, c.oid) as bound "
        "from pg_class c where c.relname like 'requests_y203%' and c.relkind = 'r' order by 1"
    )
    await connection.close()
    assert [row["relname"] for row in bounds] == [
        "requests_y2031m11",
        "requests_y2031m12",
        "requests_y2032m01",
    ]
    assert "2031-11-01 00:00:00+00" in bounds[0]["bound"]


async def test_rows_of_the_default_partition_move_to_their_month(
    connection: asyncpg.Connection,
) -> None:
    edges = [
        datetime(2031, 4, 30, 23, 59, 59, 999999, tzinfo=UTC),
        datetime(2031, 5, 1, tzinfo=UTC),
        datetime(2031, 5, 31, 23, 59, 59, 999999, tzinfo=UTC),
        datetime(2031, 6, 1, tzinfo=UTC),
    ]
    for created_at in edges:
        await _insert(connection, created_at)
    assert await connection.fetchval("select count(*) from comp_ai.requests_default") == 4
    # In another time zone, as an operator's session may be: the months stay those of UTC.
    await connection.execute("set timezone = 'Pacific/Auckland'")
    await connection.execute("select comp_ai.ensure_request_partitions('2031-05-07', 1)")
    moved = await connection.fetch("select created_at from comp_ai.requests_y2031m05 order by 1")
    assert [row["created_at"] for row in moved] == edges[1:3]
    assert await connection.fetchval("select count(*) from comp_ai.requests") == 4


@pytest.mark.parametrize("months", [0, 121, None])
async def test_partition_count_is_checked(
    connection: asyncpg.Connection, months: int | None
) -> None:
    with pytest.raises(asyncpg.InvalidParameterValueError, match="allowed: 1 to 120"):
        await connection.execute(
            "select comp_ai.ensure_request_partitions(current_date, $1)", months
        )


async def test_plain_view_has_the_plain_shape(connection: asyncpg.Connection) -> None:
    created_at = datetime(2031, 5, 5, tzinfo=UTC)
    row_id = await _insert(connection, created_at, prompt_tokens=3, completion_tokens=4)
    await connection.execute(
        "insert into comp_ai.request_bodies values ($1, $2, 'ask', 'answer')", row_id, created_at
    )
    without_bodies = await _insert(connection, created_at)
    rows = {
        row["id"]: row for row in await connection.fetch("select * from comp_ai.requests_plain")
    }
    assert list(rows[row_id].keys()) == [
        "id",
        "user_id",
        "request_text",
        "response_text",
        "model_used",
        "tokens_used",
        "created_at",
        "updated_at",
    ]
    assert tuple(rows[row_id])[1:7] == ("ann", "ask", "answer", "m", 7, created_at)
    assert rows[without_bodies]["request_text"] is None


async def test_query_of_one_principal_uses_its_index(connection: asyncpg.Connection) -> None:
    now = datetime.now(UTC)
    await connection.execute("select comp_ai.ensure_request_partitions(current_date, 1)")
    await connection.execute(
        "insert into comp_ai.requests (id, created_at, request_id, route, status, outcome, "
        "principal_id) select gen_random_uuid(), $1::timestamptz - n * interval '1 second', 'r', "
        "'/', 200, 'completed', 'p' || n % 500 from generate_series(1, 20000) n",
        now,
    )
    await connection.execute("analyze comp_ai.requests")
    explained = await connection.fetch(
        "explain select * from comp_ai.requests where principal_id = 'p7' "
        "and created_at > now() - interval '1 day' order by created_at desc limit 50"
    )
    text = "\n".join(row[0] for row in explained)
    assert "principal_id_created_at_idx" in text
    assert "Seq Scan on requests_y" not in text


async def test_api_key_hash_must_be_a_sha256(connection: asyncpg.Connection) -> None:
    insert = (
        "insert into comp_ai.api_keys (id, prefix, secret_hash, owner, permissions) "
        "values ($1, $2, $3, 'ann', '{comp-ai:user}')"
    )
    await connection.execute(insert, new_id(), "cai-a", bytes(32))
    with pytest.raises(asyncpg.CheckViolationError):
        await connection.execute(insert, new_id(), "cai-b", bytes(31))
    with pytest.raises(asyncpg.UniqueViolationError):
        await connection.execute(insert, new_id(), "cai-a", bytes(32))


async def test_what_the_last_release_writes_of_a_key_fits(connection: asyncpg.Connection) -> None:
    # Its statements, word for word: it may run beside this schema during an update.
    key_id, now = new_id(), datetime.now(UTC)
    await connection.execute(
        "INSERT INTO comp_ai.api_keys (id, prefix, secret_hash, name, owner, permissions, models, "
        "created_at, created_by, expires_at) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
        *(key_id, "p", bytes(32), "k", "ann", ["comp-ai:user"], None, now, "cli", None),
    )
    await connection.execute(
        "UPDATE comp_ai.api_keys SET revoked_at = coalesce(revoked_at, $2) WHERE id = $1",
        *(key_id, now),
    )


@pytest.mark.parametrize(
    ("columns", "values"),
    [
        ("limits", "'[]'"),
        ("limits", "'3'"),
        ("note", "repeat('x', 1001)"),
        ("replaced_by", "(select id from comp_ai.api_keys)"),
        ("replaced_by, expires_at", "gen_random_uuid(), now()"),
    ],
)
async def test_a_key_that_cannot_be_is_refused(
    connection: asyncpg.Connection, columns: str, values: str
) -> None:
    insert = (
        "insert into comp_ai.api_keys (prefix, secret_hash, owner, permissions, {}) "
        "values ('{}', sha256('x'), 'ann', '{{comp-ai:user}}', {})"
    )
    await connection.execute(insert.format("id", "first", "gen_random_uuid()"))
    second = insert.format(f"id, {columns}", "second", f"gen_random_uuid(), {values}")
    with pytest.raises(asyncpg.IntegrityConstraintViolationError):
        await connection.execute(second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"password": "hunter2-not-it"}, "refuses the role 'comp_ai'"),
        ({"database": "nowhere"}, "has no database 'nowhere'"),
        ({"host": "/nonexistent"}, "cannot be reached"),
        ({"host": "127.0.0.1", "port": 1}, "cannot be reached"),
    ],
)
async def test_connection_errors_say_what_to_check(
    database: PostgresSettings, change: dict[str, object], message: str
) -> None:
    wrong = PostgresSettings.model_validate(
        {
            f.alias: change.get(n, getattr(database, n))
            for n, f in PostgresSettings.model_fields.items()
        }
    )
    with pytest.raises(DatabaseUnavailable, match=message) as caught:
        await connect(wrong, application_name="tests")
    with pytest.raises(DatabaseUnavailable, match=message):
        await create_pool(wrong, min_size=1, max_size=1, application_name="tests")
    assert wrong.password is not None
    assert wrong.password.get_secret_value() not in str(caught.value)


async def test_pool_sets_timeout_name_and_zone(database: PostgresSettings) -> None:
    pool = await create_pool(database, min_size=1, max_size=2, application_name="comp-ai tests")
    shown = [
        await pool.fetchval(f"show {name}")
        for name in ("statement_timeout", "application_name", "timezone")
    ]
    await pool.close()
    assert shown == ["30s", "comp-ai tests", "UTC"]


async def _insert(
    connection: asyncpg.Connection,
    created_at: datetime,
    prompt_tokens: int = 0,
    completion_tokens: int = 0,
) -> object:
    row_id = new_id()
    await connection.execute(
        "insert into comp_ai.requests (id, created_at, request_id, route, status, outcome, "
        "principal_id, model, prompt_tokens, completion_tokens) "
        "values ($1, $2, 'r', '/v1/chat/completions', 200, 'completed', 'ann', 'm', $3, $4)",
        row_id,
        created_at,
        prompt_tokens,
        completion_tokens,
    )
    return row_id
