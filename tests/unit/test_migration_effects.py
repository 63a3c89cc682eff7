"""What is told of a migration before it runs, and what none may do."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve_app.database import Migration, read_migrations
from serve_app.migration_effects import Work, effects

ALL = read_migrations(Path(__file__).parents[2] / "migrations")
# Tables that grow with use: nobody may wait while one of them is read or written whole.
BIG = {
    "comp_ai.requests",
    "comp_ai.request_bodies",
    "comp_ai.responses",
    "comp_ai.file_chunks",
    "comp_ai.batch_lines",
    "comp_ai.audit_log",
    "comp_ai.usage_minute",
    "comp_ai.usage_hour",
    "comp_ai.usage_day",
}
# Put before a statement that takes long all the same, with the reason.
REASON = "-- Takes long: "
# The same for files that were applied before they had that line: they may not change any more.
REASONS = {
    "0016_search": "records wait in the spool while the indexes are built, so no request waits; "
    "there is no release yet whose table has many rows",
}


@pytest.mark.parametrize(
    ("sql", "told"),
    [
        ("alter table t add column a int", ["t: ACCESS EXCLUSIVE, brief"]),
        ("drop index t_by_a", ["t_by_a: ACCESS EXCLUSIVE, brief"]),
        ("alter table t add column a int not null default 0", ["t: ACCESS EXCLUSIVE, brief"]),
        (
            "alter table t add a int not null",
            ["t: ACCESS EXCLUSIVE, brief, refused where there are rows"],
        ),
        (
            "alter table t add column a uuid default gen_random_uuid()",
            ["t: ACCESS EXCLUSIVE, rewrites every row"],
        ),
        (
            "alter table t add column a numeric(3, 2) check (a > 0), drop column b",
            ["t: ACCESS EXCLUSIVE, reads every row", "t: ACCESS EXCLUSIVE, brief"],
        ),
        ("alter table s.t alter b type bigint", ["s.t: ACCESS EXCLUSIVE, rewrites every row"]),
        ("alter table t alter column b set not null", ["t: ACCESS EXCLUSIVE, reads every row"]),
        (
            "alter table t add constraint c check (a > 0) not valid",
            ["t: ACCESS EXCLUSIVE, brief"],
        ),
        ("alter table t validate constraint c", ["t: SHARE UPDATE EXCLUSIVE, reads every row"]),
        ("alter table t add unique (a)", ["t: ACCESS EXCLUSIVE, builds an index"]),
        ("create unique index i on only t (a)", ["t: SHARE, builds an index"]),
        ("create index on t (a)", ["t: SHARE, builds an index"]),
        (
            "create trigger x after insert or update on t for each row execute function f()",
            ["t: SHARE ROW EXCLUSIVE, brief"],
        ),
        (
            "create table n (id int references t)",
            ["t: SHARE ROW EXCLUSIVE, brief"],
        ),
        (
            "create table n partition of t default",
            ["t: ACCESS EXCLUSIVE, reads every row"],
        ),
        ("with x as (select 1) insert into t select 1", ["t: ROW EXCLUSIVE, changes rows"]),
        ("update t set a = 1", ["t: ROW EXCLUSIVE, changes rows"]),
        ("delete from only t", ["t: ROW EXCLUSIVE, changes rows"]),
        ("do $$ begin perform 1; end $$", ["do: any, runs code that is not looked into"]),
        ("select f()", ["select: any, runs code that is not looked into"]),
        # Nothing of a table that is made here, nor of what only looks like a statement.
        ("create table t (a int); create index on t (a); insert into t values (1)", []),
        ("-- drop table t;\n/* drop table t; */ comment on table t is '; drop table t'", []),
        ("create function f() returns void language sql as $$ drop table t; $$", []),
    ],
)
def test_what_a_statement_does_is_told(sql: str, told: list[str]) -> None:
    assert [str(effect) for effect in effects(sql)] == told


@pytest.mark.parametrize("migration", ALL, ids=lambda one: one.label)
def test_no_migration_keeps_everybody_waiting(migration: Migration) -> None:
    assert complaints(migration) == []


def complaints(migration: Migration) -> list[str]:
    """Return what is not allowed, with what to do about it."""
    found = []
    reasoned = REASON in migration.sql or migration.label in REASONS
    for effect in effects(migration.sql):
        if effect.refused_with_rows:
            found.append(f"{effect}: give the column a default")
        elif effect.table in BIG and effect.work is Work.REWRITES:
            found.append(f"{effect}: add a column beside it instead")
        elif effect.table in BIG and effect.work is not Work.BRIEF and not reasoned:
            found.append(f"{effect}: say why in a line `{REASON}…`, or do without")
    return found


@pytest.mark.parametrize(
    "sql",
    [
        "alter table comp_ai.requests alter column status type bigint",
        f"{REASON}it must\nalter table comp_ai.requests add column x uuid default uuidv7()",
        "alter table comp_ai.api_keys add column x int not null",
        "create index on comp_ai.requests (model)",
        "update comp_ai.requests set model = 'm'",
    ],
)
def test_what_would_keep_everybody_waiting_is_found(sql: str) -> None:
    assert complaints(Migration(version=1, name="x", sql=sql))


def test_an_index_with_a_reason_is_let_through() -> None:
    sql = f"{REASON}the table is new\ncreate index on comp_ai.requests (model)"
    assert complaints(Migration(version=1, name="x", sql=sql)) == []
