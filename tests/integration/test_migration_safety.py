"""Each migration on tables that have rows: the same schema from everywhere, and what it locks."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import asyncpg
import pytest

from serve_app.database import Migration, connect, migrate, read_migrations
from serve_app.migration_effects import Effect, Work, effects
from serve_app.settings import PostgresSettings
from tests.integration.command_line import COMP_AI, comp_ai, comp_ai_environment
from tests.integration.conftest import MIGRATIONS, PostgresServer
from tests.integration.rows import fill

ALL = read_migrations(MIGRATIONS)
# The newest of the release before: previous_release/statements.sql is what it says.
RELEASED = ALL[7]

# Weakest first: of two locks on one table the later one is the one that others feel.
LOCKS = (
    "ACCESS SHARE",
    "ROW SHARE",
    "ROW EXCLUSIVE",
    "SHARE UPDATE EXCLUSIVE",
    "SHARE",
    "SHARE ROW EXCLUSIVE",
    "EXCLUSIVE",
    "ACCESS EXCLUSIVE",
)
_HELD = """
select 'comp_ai.' || (select relname from pg_class
                      where oid = coalesce(pg_partition_root(l.relation), l.relation)) as table,
       upper(regexp_replace(replace(l.mode, 'Lock', ''), '(?<=[a-z])(?=[A-Z])', ' ', 'g')) as lock
from pg_locks l join pg_class c on c.oid = l.relation
where l.pid = pg_backend_pid() and c.relkind in ('r', 'p', 'v')
  and c.relnamespace = 'comp_ai'::regnamespace and l.relation::bigint = any($1)
"""
_FILES = """
select oid::bigint as oid, pg_relation_filenode(oid)::bigint as file, 'comp_ai.' || relname as table
from pg_class where relnamespace = 'comp_ai'::regnamespace and relkind in ('r', 'p', 'v')
  and relname <> 'schema_migrations'
"""

_INDEXES = """
select 'comp_ai.' || i.relname as index, 'comp_ai.' || t.relname as table
from pg_index join pg_class i on i.oid = indexrelid join pg_class t on t.oid = indrelid
where t.relnamespace = 'comp_ai'::regnamespace
"""


def schema_of(server: PostgresServer, settings: PostgresSettings) -> list[str]:
    """Return the lines of the schema as pg_dump writes it, which is in the order of names."""
    assert settings.password is not None
    done = subprocess.run(
        [server.embedded.bin_dir / "pg_dump", "--schema-only", "--schema=comp_ai*",
         f"--host={settings.host}", f"--username={settings.user}", settings.database],
        env={"PGPASSWORD": settings.password.get_secret_value()},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    # Of each dump's own: a random word.
    lines = done.stdout.splitlines()
    return [line for line in lines if not line.startswith(("\\restrict", "\\unrestrict"))]


@pytest.fixture(scope="module")
def from_empty(postgres_server: PostgresServer) -> list[str]:
    settings = postgres_server.new_database("template_comp_ai")
    schema = schema_of(postgres_server, settings)
    postgres_server.drop(settings)
    return schema


@pytest.mark.parametrize("first", ALL[:-1], ids=lambda migration: migration.label)
async def test_from_each_version_with_rows_the_schema_is_the_same(
    postgres_server: PostgresServer,
    empty_database: PostgresSettings,
    from_empty: list[str],
    tmp_path: Path,
    first: Migration,
) -> None:
    await migrate(empty_database, directory=until(first, tmp_path))
    connection = await connect(empty_database, application_name="tests")
    tables = await fill(connection)
    await migrate(empty_database, directory=MIGRATIONS)
    for table in tables:
        assert await connection.fetchval(f"select exists (select from {table})"), table
    await connection.close()
    assert await asyncio.to_thread(schema_of, postgres_server, empty_database) == from_empty


def until(last: Migration, folder: Path) -> Path:
    """Return a folder of the migrations up to `last`."""
    for file in MIGRATIONS.glob("*.sql"):
        if int(file.name[:4]) <= last.version:
            shutil.copy(file, folder)
    return folder


async def test_what_the_plan_says_of_locks_is_true(empty_database: PostgresSettings) -> None:
    connection = await connect(empty_database, application_name="tests")
    await connection.execute("create schema comp_ai")
    for migration in ALL:
        before = {row["oid"]: row for row in await connection.fetch(_FILES)}
        tables = {row["index"]: row["table"] for row in await connection.fetch(_INDEXES)}
        # Of an index that is dropped the text names no table.
        claimed = [
            replace(effect, table=tables.get(effect.table, effect.table))
            for effect in effects(migration.sql)
        ]
        async with connection.transaction():
            await connection.execute(migration.sql)
            held = await connection.fetch(_HELD, list(before))
        # Of a `do` block the plan says that it cannot tell the locks.
        told = all(effect.work is not Work.UNKNOWN for effect in claimed)
        for row in held if told else ():
            strongest = max((LOCKS.index(e.lock) for e in of(claimed, row["table"])), default=0)
            # Beside SHARE UPDATE EXCLUSIVE everybody reads and writes on.
            assert LOCKS.index(row["lock"]) <= max(3, strongest), (migration.label, row)
        after = {row["oid"]: row["file"] for row in await connection.fetch(_FILES)}
        for oid, row in before.items():
            if after.get(oid) != row["file"]:
                works = {effect.work for effect in of(claimed, row["table"])}
                assert Work.REWRITES in works, (migration.label, row["table"])
        await fill(connection)
    await connection.close()


def of(claimed: list[Effect], table: str) -> list[Effect]:
    return [effect for effect in claimed if effect.table == table and effect.lock in LOCKS]


async def test_two_processes_at_once_apply_each_migration_once(
    empty_database: PostgresSettings,
) -> None:
    runners = [
        await asyncio.create_subprocess_exec(
            *(str(COMP_AI), "migrate"),
            env=comp_ai_environment(empty_database),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        for _ in range(2)
    ]
    said = [await runner.communicate() for runner in runners]
    assert [runner.returncode for runner in runners] == [0, 0], said
    lines = b"".join(out for out, _ in said).decode().splitlines()
    assert sorted(lines) == sorted(
        [f"applied: {migration.label}" for migration in ALL] + ["the schema is up to date"]
    )


async def test_the_plan_tells_names_checksums_and_locks_and_changes_nothing(
    empty_database: PostgresSettings, tmp_path: Path
) -> None:
    await migrate(empty_database, directory=until(ALL[4], tmp_path))
    for _ in range(2):
        done = await asyncio.to_thread(comp_ai, empty_database, "migrate", "--plan")
        assert done.returncode == 3, done.stderr
        told = [line for line in done.stdout.splitlines() if line.startswith("to apply")]
        assert told == [f"to apply: {one.label}  sha256 {one.sha256}" for one in ALL[5:]]
        assert "    comp_ai.api_keys: SHARE, builds an index" in done.stdout.splitlines()
    await migrate(empty_database, directory=MIGRATIONS)
    done = await asyncio.to_thread(comp_ai, empty_database, "migrate", "--plan")
    assert (done.returncode, done.stdout) == (0, "the schema is up to date\n")


def statements_of_the_release_before() -> dict[str, str]:
    text = (Path(__file__).parent / "previous_release" / "statements.sql").read_text("utf-8")
    _, *parts = re.split(r"^-- name: (\w+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


async def test_every_statement_of_the_release_before_is_understood(
    connection: asyncpg.Connection,
) -> None:
    statements = statements_of_the_release_before()
    for name in ("accounts_stage_requests", "accounts_stage_bodies"):
        await connection.execute(statements[name])
    for name, statement in statements.items():
        try:
            await connection.prepare(statement)
        except asyncpg.PostgresError as error:
            pytest.fail(f"{name}: {error}")


async def test_what_the_release_before_inserts_is_all_that_must_be_given(
    empty_database: PostgresSettings, tmp_path: Path
) -> None:
    connection = await connect(empty_database, application_name="tests")
    await migrate(empty_database, directory=until(RELEASED, tmp_path))
    before = await required_columns(connection)
    await migrate(empty_database, directory=MIGRATIONS)
    now = await required_columns(connection)
    await connection.close()
    tables = {table for table, _ in before}
    assert {column for column in now if column[0] in tables} <= before


async def required_columns(connection: asyncpg.Connection) -> set[tuple[str, str]]:
    rows = await connection.fetch(
        "select c.relname, a.attname from pg_attribute a join pg_class c on c.oid = a.attrelid "
        "where c.relnamespace = 'comp_ai'::regnamespace and c.relkind in ('r', 'p') "
        "and a.attnum > 0 and a.attnotnull and not a.atthasdef and a.attidentity = ''"
    )
    return {(row["relname"], row["attname"]) for row in rows}
