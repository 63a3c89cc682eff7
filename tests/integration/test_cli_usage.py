"""`comp-ai usage`: the same sums as the records give, in each form, page by page."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from serve_app.accounts import writer
from serve_app.records import Outcome, RequestRecord, new_id, utc_now
from serve_app.settings import PostgresSettings
from serve_app.usage.folding import fold
from tests.integration.command_line import comp_ai
from tests.sealing import subject_keys

_KEY = uuid.UUID(int=7)
_START = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)
_SPAN = ("--from", "2026-03-01", "--to", "2026-03-06")
_ODD = "=cmd()[red]\x1b[31m"


def _record(number: int) -> RequestRecord:
    return RequestRecord(
        id=new_id(),
        request_id="r",
        created_at=_START + timedelta(hours=7 * number % 96),
        route="chat.completions",
        status=200,
        outcome=Outcome.FAILED if number % 5 == 0 else Outcome.COMPLETED,
        principal_id=("ann", "bob", None)[number % 3],
        model=_ODD if number % 4 == 0 else "small",
        api_key_id=_KEY if number % 2 else None,
        prompt_tokens=number,
        completion_tokens=2 * number,
        cost_micros=3 * number,
    )


RECORDS = [_record(number) for number in range(48)]

Usage = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
async def usage(database: PostgresSettings, connection: asyncpg.Connection) -> Usage:
    """The command at a database of which a part is folded and a part still pending."""
    await writer.prepare_session(connection)
    await writer.write(connection, RECORDS[:30], subject_keys())
    await fold(connection)
    await writer.write(connection, RECORDS[30:], subject_keys())
    # Wide enough for a table whose cells are not broken.
    return lambda *options: comp_ai(database, "usage", *options, COLUMNS="200")


def _printed(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def _sums(
    group: Callable[[RequestRecord], tuple[Any, ...]],
) -> dict[tuple[Any, ...], tuple[int, int, int, int, int]]:
    """Return what the records themselves give for each group."""
    groups: dict[tuple[Any, ...], list[RequestRecord]] = {}
    for record in RECORDS:
        groups.setdefault(group(record), []).append(record)
    return {
        name: (
            len(of),
            sum(one.outcome is Outcome.COMPLETED for one in of),
            sum(one.prompt_tokens for one in of),
            sum(one.completion_tokens for one in of),
            sum(one.cost_micros for one in of),
        )
        for name, of in groups.items()
    }


def _said(rows: list[dict[str, Any]], *groups: str) -> dict[tuple[Any, ...], tuple[int, ...]]:
    measures = (
        *("requests", "completed_requests", "prompt_tokens", "completion_tokens"),
        "cost_micros",
    )
    said = {
        tuple(row[name] for name in groups): tuple(row[name] for name in measures) for row in rows
    }
    assert len(said) == len(rows)
    return said


def _hour(record: RequestRecord) -> str:
    return record.created_at.replace(minute=0).isoformat()


def _key(record: RequestRecord) -> str | None:
    return None if record.api_key_id is None else str(record.api_key_id)


def test_each_grouping_gives_the_sums_of_the_records(usage: Usage) -> None:
    groupings: dict[tuple[str, ...], Callable[[RequestRecord], tuple[Any, ...]]] = {
        ("day",): lambda r: (r.created_at.replace(hour=0, minute=0).isoformat(),),
        ("hour", "model"): lambda r: (_hour(r), r.model),
        ("principal", "model", "key"): lambda r: (r.principal_id, r.model, _key(r)),
    }
    for words, group in groupings.items():
        rows = _printed(usage(*_SPAN, "--json", "--group-by", ",".join(words)))
        names = ["start" if word in ("day", "hour") else word for word in words]
        assert _said(rows, *names) == _sums(group)


def test_only_what_is_named_is_added_up(usage: Usage) -> None:
    options = ("--principal", "bob", "--model", "small", "--key", str(_KEY))
    rows = _printed(usage(*_SPAN, "--json", "--group-by", "principal,model,key", *options))
    wanted = ("bob", "small", str(_KEY))
    assert _said(rows, "principal", "model", "key") == {
        wanted: _sums(lambda r: (r.principal_id, r.model, _key(r)))[wanted]
    }
    assert _printed(usage(*_SPAN, "--json", "--principal", "nobody")) == []


def test_pages_are_the_whole_and_say_where_to_go_on(usage: Usage) -> None:
    whole = usage(*_SPAN, "--json", "--group-by", "principal,model")
    assert (len(_printed(whole)), whole.stderr) == (6, "")
    rows: list[dict[str, Any]] = []
    after: tuple[str, ...] = ()
    for number in (4, 2):
        page = usage(*_SPAN, "--json", "--group-by", "principal,model", "--limit", "4", *after)
        assert len(_printed(page)) == number
        rows += _printed(page)
        after = ("--after", rows[-1]["id"])
        assert page.stderr == (
            f"There are more: go on with --after {rows[-1]['id']}\n" if number == 4 else ""
        )
    assert rows == _printed(whole)


def test_csv_says_the_same_and_no_formula(usage: Usage) -> None:
    options = (*_SPAN, "--group-by", "principal,model")
    rows, done = _printed(usage(*options, "--json")), usage(*options, "--csv")
    table = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [(line["principal"], int(line["requests"])) for line in table] == [
        (row["principal"] or "", row["requests"]) for row in rows
    ]
    assert {line["model"] for line in table} == {"small", f"'{_ODD}"}


def test_a_terminal_gets_a_table_that_it_does_not_obey(usage: Usage) -> None:
    done = usage(*_SPAN, "--group-by", "model")
    assert done.returncode == 0, done.stderr
    assert "=cmd()[red]?[31m" in done.stdout
    assert "\x1b" not in done.stdout


async def test_the_last_days_where_no_time_is_named(
    database: PostgresSettings, connection: asyncpg.Connection
) -> None:
    old, new = (utc_now() - timedelta(days=days) for days in (40, 0))
    records = [replace(_record(number), created_at=at) for number, at in enumerate((old, new))]
    await writer.write(connection, records, subject_keys())
    (row,) = _printed(comp_ai(database, "usage", "--json"))
    assert (row["requests"], row["start"][:10]) == (1, f"{new:%Y-%m-%d}")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--group-by", "day,hour"), "--group-by"),
        (("--group-by", "week"), "--group-by"),
        (("--from", "yesterday"), "--from"),
        (("--from", "2026-03-01T00:00:30Z"), "--from is '2026-03-01T00:00:30Z'"),
        (("--from", "2026-03-05", "--to", "2026-03-05"), "--to is '2026-03-05'"),
        (("--from", "2026-01-01T00:01", "--to", "2026-03-05"), "--from"),
        (("--key", "cai-x"), "--key"),
        (("--after", "x"), "--after is 'x'"),
        (("--csv", "--json"), "--csv"),
        (("--limit", "0"), "--limit"),
    ],
    ids=" ".join,
)
def test_what_is_asked_wrongly_is_refused_by_name(
    database: PostgresSettings, options: tuple[str, ...], named: str
) -> None:
    done = comp_ai(database, "usage", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert named in done.stderr


def test_without_tables_or_server_it_says_what_to_do(empty_database: PostgresSettings) -> None:
    done = comp_ai(empty_database, "usage")
    assert (done.returncode, done.stdout) == (1, "")
    assert "comp-ai migrate" in done.stderr
    away = empty_database.model_copy(update={"port": 1})
    assert comp_ai(away, "usage").returncode == 1
