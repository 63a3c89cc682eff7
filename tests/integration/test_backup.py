"""Backups with the real pg_dump: made, read back, restored; refused where they are not whole."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shutil
import signal
import stat
import subprocess
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from serve_app.accounts.bodies import open_bodies
from serve_app.audit.act import Actor
from serve_app.audit.verify import verify
from serve_app.backup.contents import count_rows, query, read_contents
from serve_app.backup.create import Backups, session
from serve_app.backup.errors import BackupDamaged, BackupError
from serve_app.backup.folder import BackupFolder
from serve_app.backup.keyring import KeyRingFile
from serve_app.backup.manifest import Manifest
from serve_app.backup.programs import PostgresPrograms
from serve_app.backup.restore import Restore, check_target, undo_broken_off
from serve_app.backup.scheme import KeepScheme
from serve_app.backup.scratch import given_database, scratch_database
from serve_app.backup.trial import drill, verify_deep, verify_file
from serve_app.backup.watch import backup_task
from serve_app.database import connect
from serve_app.errors import ConfigError
from serve_app.records import new_id
from serve_app.settings import PostgresSettings, load_settings
from serve_app.stack.postgres import EmbeddedPostgres
from serve_app.stack.standalone import programs_folder
from serve_app.subjects.erasing import Eraser, reapply_erasures
from tests.integration.command_line import COMP_AI, comp_ai, comp_ai_environment
from tests.integration.conftest import MIGRATIONS, PostgresServer
from tests.integration.people import marker, names_of, places_of, plant
from tests.integration.rows import append_to_audit_log, fill
from tests.sealing import MASTERS, subject_keys

ACTOR = Actor(id="tests", kind="operator")
SECRET = "the text of a prompt"


@pytest.fixture
def programs(postgres_server: PostgresServer) -> PostgresPrograms:
    return PostgresPrograms(postgres_server.embedded.bin_dir)


@pytest.fixture
def backups(tmp_path: Path, programs: PostgresPrograms) -> Backups:
    return Backups(BackupFolder(tmp_path / "backups"), programs, ACTOR)


@pytest.fixture
async def filled(database: PostgresSettings) -> AsyncIterator[asyncpg.Connection]:
    """A connection to `database`, which has rows in every table and in several partitions."""
    connection = await connect(database, application_name="tests")
    await connection.execute("select comp_ai.ensure_request_partitions('2031-01-01', 3)")
    await connection.execute(
        "create schema if not exists comp_ai_keys;"
        "create table comp_ai_keys.of_tests (id uuid primary key, wrapped bytea not null)"
    )
    await fill(connection)
    for month in ("2031-01-31", "2031-02-01", "2031-03-31", "2040-01-01"):
        await add_request(connection, month)
    await append_to_audit_log(connection, 20)
    yield connection
    connection.terminate()


async def add_request(connection: asyncpg.Connection, day: str) -> None:
    values = (new_id(), day)
    await connection.execute(
        "insert into comp_ai.requests (id, created_at, request_id, route, status, outcome) "
        "values ($1, $2::text::timestamptz, 'r', '/', 200, 'completed')",
        *values,
    )
    await connection.execute(
        "insert into comp_ai.request_bodies (id, created_at, request_body) "
        "values ($1, $2::text::timestamptz, $3)",
        *(*values, SECRET),
    )


def restore_of(backups: Backups, manifest: Manifest) -> Restore:
    return Restore(
        manifest=manifest,
        folder=backups.folder,
        programs=backups.programs,
        ring=KeyRingFile(backups.folder.path).read(),
        migrations=MIGRATIONS,
        reapply=nothing_was_erased,
        actor=ACTOR,
    )


async def nothing_was_erased(connection: asyncpg.Connection) -> int:
    return 0


async def everything(connection: asyncpg.Connection) -> dict[str, list[str]]:
    """Return all rows of all tables, as text."""
    found = {}
    for table in await count_rows(connection):
        rows = await connection.fetch(f"select t::text from comp_ai.{table} t order by 1")
        found[table] = [row[0] for row in rows]
    return found


async def test_what_was_backed_up_comes_back_row_by_row(
    database: PostgresSettings,
    empty_database: PostgresSettings,
    filled: asyncpg.Connection,
    backups: Backups,
) -> None:
    before = await everything(filled)
    keys = await filled.fetch("select * from comp_ai_keys.of_tests")
    manifest = await backups.create(database)
    assert {name: len(rows) for name, rows in before.items()} == manifest.contents.rows
    assert all(manifest.contents.rows.values())

    restored = await restore_of(backups, manifest).into(empty_database)

    assert restored.rows == manifest.contents.rows
    connection = await connect(empty_database, application_name="tests")
    after = await everything(connection)
    [act] = set(after.pop("audit_log")) - set(before.pop("audit_log"))
    assert "backup.restore" in act
    before.pop("audit_head"), after.pop("audit_head")
    assert after == before
    assert await connection.fetch("select * from comp_ai_keys.of_tests") == keys
    assert (await verify(connection, manifest.contents.audit.link)).intact
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await connection.execute("delete from comp_ai.audit_log")
    await connection.close()


async def test_a_backup_is_closed_to_others_and_holds_no_key(
    database: PostgresSettings, filled: asyncpg.Connection, backups: Backups
) -> None:
    manifest = await backups.create(database)
    files = [*backups.folder.path.iterdir(), backups.folder.path]
    open_to_others = {f.name for f in files if stat.S_IMODE(f.stat().st_mode) & 0o077}
    assert open_to_others <= {".lock", ".keyring.lock"}
    dump = backups.folder.dump(manifest.name)
    script = await asyncio.to_thread(as_script, backups.programs, dump)
    assert SECRET in script
    assert "CREATE TABLE comp_ai_keys.of_tests" in script
    assert "COPY comp_ai_keys" not in script


def as_script(programs: PostgresPrograms, dump: Path) -> str:
    assert programs.folder is not None
    command = [programs.folder / "pg_restore", "--file=-", dump]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


async def test_the_counts_are_of_the_snapshot_while_others_write(
    database: PostgresSettings, filled: asyncpg.Connection, backups: Backups, maker: Any
) -> None:
    writing, stop = asyncio.Event(), asyncio.Event()

    async def write() -> None:
        while not stop.is_set():
            await add_request(filled, "2031-02-02")
            await append_to_audit_log(filled)
            writing.set()

    writer = asyncio.create_task(write())
    await writing.wait()
    manifest = await backups.create(database)
    stop.set()
    await writer
    rows = await count_rows(filled)
    assert rows["requests"] > manifest.contents.rows["requests"] > 5
    scratch = scratch_database(database, maker)
    await verify_deep(manifest, backups.folder, backups.programs, scratch)


@pytest.fixture
def maker(postgres_server: PostgresServer) -> PostgresSettings:
    return postgres_server.embedded.admin_settings()


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def change(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (truncate, "its manifest says"),
        (change, "was changed"),
        (Path.unlink, "is missing"),
    ],
)
async def test_a_harmed_dump_is_refused(
    database: PostgresSettings,
    empty_database: PostgresSettings,
    backups: Backups,
    harm: Any,
    message: str,
) -> None:
    manifest = await backups.create(database)
    harm(backups.folder.dump(manifest.name))
    with pytest.raises(BackupDamaged, match=message):
        await verify_file(manifest, backups.folder, backups.programs)
    with pytest.raises(BackupDamaged, match=message):
        await restore_of(backups, manifest).into(empty_database)
    connection = await connect(empty_database, application_name="tests")
    assert await connection.fetchval("select to_regnamespace('comp_ai')") is None
    await connection.close()


async def test_a_manifest_that_says_otherwise_is_found_by_a_deep_verification(
    database: PostgresSettings,
    filled: asyncpg.Connection,
    backups: Backups,
    maker: PostgresSettings,
) -> None:
    manifest = await backups.create(database)
    rows = manifest.contents.rows | {"requests": 1}
    contents = manifest.contents.model_copy(update={"rows": rows})
    wrong = manifest.model_copy(update={"contents": contents})
    scratch = scratch_database(database, maker)
    with pytest.raises(BackupDamaged, match=r"requests has 5 rows, not 1"):
        await verify_deep(wrong, backups.folder, backups.programs, scratch)
    assert await scratch_databases(filled) == []


async def scratch_databases(connection: asyncpg.Connection) -> list[str]:
    rows = await connection.fetch(
        "select datname from pg_database where datname like 'comp_ai_scratch%'"
    )
    return [row["datname"] for row in rows]


async def test_a_backup_that_is_killed_leaves_nothing_that_is_taken_for_one(
    database: PostgresSettings, tmp_path: Path, backups: Backups
) -> None:
    folder = tmp_path / "backups"
    slow = slow_programs(tmp_path, backups.programs)
    environ = comp_ai_environment(
        database, COMP_AI_BACKUP_PATH=str(folder), COMP_AI_BACKUP_PROGRAMS=str(slow)
    )
    process = await asyncio.create_subprocess_exec(
        *(str(COMP_AI), "backup", "create"), env=environ, start_new_session=True
    )
    # The dump is whole by then, and nothing says so yet.
    await asyncio.to_thread((slow / "dumped").read_bytes)
    os.killpg(process.pid, signal.SIGKILL)
    await process.wait()

    [left] = folder.glob("comp-ai-*")
    assert left.name.endswith(".dump.partial")
    done = await asyncio.to_thread(
        comp_ai, database, "backup", "verify", COMP_AI_BACKUP_PATH=str(folder)
    )
    assert done.returncode == 1
    assert "There is no backup" in done.stderr
    manifest = await backups.create(database)
    names = sorted(file.name for file in folder.glob("comp-ai-*"))
    assert names == [f"{manifest.name}.dump", f"{manifest.name}.json"]


def slow_programs(folder: Path, programs: PostgresPrograms) -> Path:
    """Return a folder of programs, of which pg_dump says when it is done, and then hangs."""
    made = folder / "programs"
    made.mkdir()
    os.mkfifo(made / "dumped")
    assert programs.folder is not None
    (made / "pg_restore").symlink_to(programs.folder / "pg_restore")
    (made / "pg_dump").write_text(
        f'#!/bin/sh\ncase "$*" in *--version*) exec {programs.folder}/pg_dump --version;; esac\n'
        f'{programs.folder}/pg_dump "$@"\necho > {made}/dumped\nread line < {made}/dumped\n'
    )
    (made / "pg_dump").chmod(0o700)
    return made


async def test_a_cancelled_backup_leaves_nothing(
    database: PostgresSettings, tmp_path: Path, backups: Backups
) -> None:
    slow = PostgresPrograms(slow_programs(tmp_path, backups.programs))
    task = asyncio.create_task(Backups(backups.folder, slow, ACTOR).create(database))
    await asyncio.to_thread((tmp_path / "programs" / "dumped").read_bytes)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list(backups.folder.path.glob("comp-ai-*")) == []


async def test_a_database_with_rows_is_not_overwritten(
    database: PostgresSettings, filled: asyncpg.Connection
) -> None:
    filled.terminate()
    await alone_in(database)
    async with session(database) as connection:
        with pytest.raises(BackupError, match=r"has rows \(api_keys, audit_log"):
            await check_target(connection, replace=False)
        await check_target(connection, replace=True)


async def alone_in(settings: PostgresSettings) -> None:
    """Return once nobody else is in the database: a session ends after its socket."""
    async with session(settings) as connection:
        while await connection.fetchval(query("other_sessions")):  # noqa: ASYNC110  no event
            await asyncio.sleep(0.01)


async def test_a_restore_is_refused_while_the_service_is_connected(
    database: PostgresSettings, connection: asyncpg.Connection
) -> None:
    async with session(database) as other:
        with pytest.raises(BackupError, match="1 other sessions are in the database"):
            await check_target(other, replace=True)


async def test_a_failed_replacement_puts_back_what_was_there(
    database: PostgresSettings, filled: asyncpg.Connection, backups: Backups
) -> None:
    manifest = await backups.create(database)
    await add_request(filled, "2031-01-02")
    before = await everything(filled)

    async def fails(connection: asyncpg.Connection) -> int:
        raise BackupError("the erasures cannot be done again")

    restore = restore_of(backups, manifest)
    failing = dataclasses.replace(restore, reapply=fails)
    with pytest.raises(BackupError, match="cannot be done again"):
        await failing.into(database)
    assert await everything(filled) == before
    # It is also put back by the next one, if there was no time to.
    await filled.execute("alter schema comp_ai rename to comp_ai_replaced; create schema comp_ai")
    await undo_broken_off(filled)
    assert await everything(filled) == before


async def test_the_key_ring_is_of_the_newest_generation_only(
    database: PostgresSettings,
    empty_database: PostgresSettings,
    filled: asyncpg.Connection,
    backups: Backups,
) -> None:
    manifest = await backups.create(database)
    ring = KeyRingFile(backups.folder.path)
    old = backups.folder.path / "copy-of-the-old-file"
    old.hardlink_to(ring.path)
    assert b"wrapped" in old.read_bytes()
    await filled.execute("delete from comp_ai_keys.of_tests")
    await ring.rewrite(filled)
    # The old generation was overwritten where it stood, not only unlinked.
    assert not old.read_bytes().strip(b"\0")
    assert list(backups.folder.path.glob("keyring*")) == [ring.path]
    restored = await restore_of(backups, manifest).into(empty_database)
    assert restored.keys["of_tests"] == 0


async def test_an_old_dump_brings_nothing_back_of_who_was_erased_since(
    database: PostgresSettings,
    empty_database: PostgresSettings,
    connection: asyncpg.Connection,
    backups: Backups,
) -> None:
    for subject in ("ann", "ben"):
        await plant(connection, subject)
    manifest = await backups.create(database)
    await Eraser(connection, MASTERS).erase("ann", ACTOR)
    await KeyRingFile(backups.folder.path).rewrite(connection)

    restore = dataclasses.replace(
        restore_of(backups, manifest), reapply=partial(reapply_erasures, masters=MASTERS)
    )
    restored = await restore.into(empty_database)

    assert restored.erased_again == 1
    target = await connect(empty_database, application_name="tests")
    assert await places_of(target, *names_of("ann")) == {"audit_log": 1}
    rows = await target.fetch("select * from comp_ai.request_bodies where sealed is not null")
    opened = await open_bodies(target, subject_keys(), rows)
    texts = [body.request for body in opened if body is not None]
    assert texts == [f"{marker('ben')} ask"] * 2
    await target.close()


async def test_the_upkeep_tells_the_age_and_writes_the_ring_anew_after_an_erasure(
    database: PostgresSettings, filled: asyncpg.Connection, backups: Backups
) -> None:
    class Metrics:
        def backup_age_s(self, seconds: float | None) -> None:
            told.append(seconds)

    told: list[float | None] = []
    path = backups.folder.path
    task = backup_task(path, Metrics())
    await task.run(filled)
    assert told == [None]
    assert not path.exists()
    await backups.create(database)
    await task.run(filled)
    assert told[1] is not None
    assert 0 < told[1] < 300
    before = KeyRingFile(path).read()
    await task.run(filled)
    assert KeyRingFile(path).read() == before
    await filled.execute("delete from comp_ai_keys.subject_keys")
    await filled.execute("update comp_ai_keys.erasures set finished_at = now()")
    await task.run(filled)
    after = KeyRingFile(path).read()
    assert after is not None
    assert after.rows == {"erasures": 1, "of_tests": 1, "subject_keys": 0}


async def test_the_key_ring_of_a_lost_installation_is_not_overwritten(
    database: PostgresSettings, connection: asyncpg.Connection, backups: Backups
) -> None:
    await backups.create(database)
    ring = KeyRingFile(backups.folder.path)
    before = ring.path.read_bytes()
    # As a fresh database in the place of a lost one has it.
    await connection.execute("update comp_ai.installation set id = gen_random_uuid()")
    with pytest.raises(BackupError, match="has the keys of installation"):
        await backups.create(database)
    with pytest.raises(BackupError, match="has the keys of installation"):
        await ring.rewrite(connection)
    assert ring.path.read_bytes() == before
    assert len(backups.folder.names()) == 1


async def test_a_damaged_key_ring_is_refused(database: PostgresSettings, backups: Backups) -> None:
    await backups.create(database)
    ring = KeyRingFile(backups.folder.path)
    changed = json.loads(ring.path.read_bytes())
    changed["tables"]["more"] = []
    ring.path.write_text(json.dumps(changed))
    with pytest.raises(BackupDamaged, match="was changed"):
        ring.read()


async def test_pruning_removes_what_the_scheme_does_not_keep(
    database: PostgresSettings, backups: Backups
) -> None:
    manifest = await backups.create(database)
    folder = backups.folder
    for day in ("01", "02"):
        created_at = manifest.created_at.replace(year=2020, month=1, day=int(day))
        old = manifest.model_copy(
            update={"name": f"comp-ai-202001{day}T000000.000Z", "created_at": created_at}
        )
        shutil.copy(folder.dump(manifest.name), folder.partial(old.name))
        folder.finish(old)
    scheme = KeepScheme(daily=2, weekly=0, monthly=0)
    assert backups.prune(scheme, dry_run=True) == ["comp-ai-20200101T000000.000Z"]
    assert len(folder.names()) == 3
    backups.prune(scheme)
    assert folder.names() == [manifest.name, "comp-ai-20200102T000000.000Z"]
    assert len(list(folder.path.glob("*.dump"))) == 2


async def test_older_programs_than_the_server_are_refused(
    database: PostgresSettings, tmp_path: Path, backups: Backups
) -> None:
    for name in ("pg_dump", "pg_restore"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{name} (PostgreSQL) 15.18 (Debian)'\n")
        (tmp_path / name).chmod(0o700)
    old = Backups(backups.folder, PostgresPrograms(tmp_path), ACTOR)
    with pytest.raises(ConfigError, match=r"PostgreSQL 15.18.*of PostgreSQL 18 or later"):
        await old.create(database)
    missing = Backups(backups.folder, PostgresPrograms(tmp_path / "none"), ACTOR)
    with pytest.raises(ConfigError, match="COMP_AI_BACKUP_PROGRAMS"):
        await missing.create(database)


async def test_a_drill_ends_with_the_database_as_it_was(
    database: PostgresSettings,
    filled: asyncpg.Connection,
    backups: Backups,
    maker: PostgresSettings,
) -> None:
    done = await drill(
        backups, database, lambda one: restore_of(backups, one), scratch_database(database, maker)
    )
    assert done.restored.rows == done.manifest.contents.rows
    assert await scratch_databases(filled) == []
    assert (await verify(filled)).intact


async def test_a_drill_that_breaks_what_it_restored_notices_and_restores_it_again(
    database: PostgresSettings,
    filled: asyncpg.Connection,
    backups: Backups,
    maker: PostgresSettings,
) -> None:
    scratch = scratch_database(database, maker)
    done = await drill(
        backups, database, lambda one: restore_of(backups, one), scratch, breaks=True
    )
    assert done.damage is not None
    assert any(found.startswith("requests has 0 rows") for found in done.damage)
    assert done.restored.rows == done.manifest.contents.rows
    assert await scratch_databases(filled) == []


async def test_where_no_database_may_be_made_an_empty_one_is_named(
    database: PostgresSettings, empty_database: PostgresSettings, backups: Backups
) -> None:
    manifest = await backups.create(database)
    scratch = scratch_database(database, database)
    with pytest.raises(BackupError, match="createdb"):
        await verify_deep(manifest, backups.folder, backups.programs, scratch)
    for _ in range(2):
        given = given_database(database, empty_database.database)
        await verify_deep(manifest, backups.folder, backups.programs, given)
    given = given_database(database, database.database)
    with pytest.raises(BackupError, match="is not empty"):
        await verify_deep(manifest, backups.folder, backups.programs, given)


@pytest.fixture
def environ(tmp_path: Path, postgres_server: PostgresServer) -> dict[str, str]:
    return {
        "COMP_AI_BACKUP_PATH": str(tmp_path / "backups"),
        "COMP_AI_BACKUP_PROGRAMS": str(postgres_server.embedded.bin_dir),
    }


async def test_back_up_break_restore_with_one_command_each(
    database: PostgresSettings, filled: asyncpg.Connection, environ: dict[str, str]
) -> None:
    async def run(*words: str) -> dict[str, Any]:
        done = await asyncio.to_thread(comp_ai, database, "backup", *words, "--json", **environ)
        assert done.returncode == 0, done.stderr
        told: dict[str, Any] = json.loads(done.stdout)
        return told

    await filled.execute("delete from comp_ai_keys.erasures")  # a row of nobody
    name = (await run("create"))["backup"]["name"]
    await filled.execute("delete from comp_ai.request_bodies")
    filled.terminate()
    await alone_in(database)

    refused = await asyncio.to_thread(comp_ai, database, "backup", "restore", name, **environ)
    assert refused.returncode == 1
    assert "--replace" in refused.stderr
    told = await run("restore", name, "--replace")

    assert told["rows"]["request_bodies"] == 5
    assert told["backup_of_before"] is not None
    listed = await run("list")
    assert [one["contents"]["rows"]["request_bodies"] for one in listed] == [0, 5]  # type: ignore[index]
    assert (await run("verify", name))["whole"] is True
    async with session(database) as connection:
        contents = await read_contents(connection)
        assert contents.rows["request_bodies"] == 5
        assert (await verify(connection)).intact


def test_a_lost_machine_is_restored_with_one_command(own_server: PostgresServer) -> None:
    embedded = own_server.embedded
    home = embedded.data_dir.parents[1]
    without = ("COMP_AI_", "POSTGRES_")
    environ = {k: v for k, v in os.environ.items() if not k.startswith(without)}
    environ["COMP_AI_HOME"] = str(home)

    def run(*words: str) -> str:
        command = [str(COMP_AI), "backup", *words]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    name = json.loads(run("create", "--json"))["backup"]["name"]
    own_server.stop()
    shutil.rmtree(home / "postgres")

    assert f"restored {name}" in run("restore", name)

    assert embedded.running_pid() is None


def test_which_programs_are_taken(tmp_path: Path) -> None:
    wheel = EmbeddedPostgres(tmp_path).bin_dir
    (tmp_path / "pg_dump").touch(mode=0o700)
    own, away = {"POSTGRES_HOST": "db"}, {"PATH": str(tmp_path / "none")}
    named = {"COMP_AI_BACKUP_PROGRAMS": "/opt/pg/bin"}
    found = [
        programs_folder(load_settings(environ), environ)
        for environ in ({}, own | {"PATH": str(tmp_path)}, own | away, own | away | named)
    ]
    assert found == [wheel, None, wheel, Path("/opt/pg/bin")]
