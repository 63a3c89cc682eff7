"""Reading usage in pages."""

from __future__ import annotations

import base64
import binascii
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import orjson

from serve_app.errors import InvalidRequest
from serve_app.sql import named_queries
from serve_app.times import parse_time
from serve_app.usage.question import By, Unit, UsagePage, UsageQuestion, source

if TYPE_CHECKING:
    import asyncpg

    from serve_app.lazy_pool import Connection as PoolConnection

START = "start"
MEASURES = (
    "requests",
    "completed_requests",
    "prompt_tokens",
    "completion_tokens",
    "cost_micros",
    "mean_duration_ms",
    "mean_time_to_first_token_ms",
)
_NO_KEY = uuid.UUID(int=0)
_COLUMNS = {By.PRINCIPAL: "principal_id", By.MODEL: "model", By.KEY: "api_key_id"}


def columns(question: UsageQuestion) -> list[str]:
    """Return the names of what a row says, in their order; beside them it has its id."""
    return [*_groups(question), *MEASURES]


@dataclass(frozen=True, slots=True)
class UsageStatement:
    """What is asked, as PostgreSQL is asked it."""

    question: UsageQuestion
    sql: str
    values: tuple[Any, ...]


async def read_usage(
    connection: asyncpg.Connection | PoolConnection, asked: UsageStatement
) -> list[dict[str, Any]]:
    """Return the rows of a page, ready for JSON; where nothing was used there is none."""
    rows = await connection.fetch(asked.sql, *asked.values)
    return [_to_json(asked.question, row) for row in rows]


def prepare(question: UsageQuestion, page: UsagePage) -> UsageStatement:
    """Return the statement that answers a page of `question`.

    Raises:
        InvalidRequest: the question has no answer here, or `after` is of another one.
    """
    table_unit = source(question)
    suffix = "" if question.needs_callers or table_unit is Unit.MINUTE else "_by_model"
    values: list[Any] = []
    names = list(_selected(question))
    direction = "desc" if page.newest_first else "asc"
    sql = _query().format(
        table=f"usage_{table_unit}{suffix}",
        groups="".join(f"{name}, " for name in names),
        folded=_select(question, exact=table_unit is question.unit),
        pending=_select(question, exact=question.unit is Unit.MINUTE),
        wanted=_wanted(question, values),
        beyond=_beyond(question, page, names, values),
        grouping=", ".join(names),
        order=", ".join(f"{name} {direction}" for name in names),
        limit=_place(values, page.limit),
    )
    return UsageStatement(question, sql, tuple(values))


def _groups(question: UsageQuestion) -> list[str]:
    return [START] * (question.unit is not None) + [str(group) for group in question.by]


def _selected(question: UsageQuestion) -> list[str]:
    return ["bucket"] * (question.unit is not None) + [_COLUMNS[group] for group in question.by]


def _select(question: UsageQuestion, *, exact: bool) -> str:
    """Return the group's columns; `exact` is where the table's times are those asked for."""
    names = _selected(question)
    if question.unit is not None and not exact:
        names[0] = f"date_trunc('{question.unit}', bucket, 'UTC') as bucket"
    return "".join(f"{name}, " for name in names)


def _place(values: list[Any], value: Any) -> str:
    values.append(value)
    return f"${len(values)}"


def _wanted(question: UsageQuestion, values: list[Any]) -> str:
    conditions = [f"bucket >= {_place(values, question.since)}"]
    if question.until is not None:
        conditions.append(f"bucket < {_place(values, question.until)}")
    for column, value in (
        ("principal_id", question.principal),
        ("model", question.model),
        ("api_key_id", question.key),
    ):
        if value is not None:
            conditions.append(f"{column} = {_place(values, value)}")
    return " and ".join(conditions)


def _beyond(
    question: UsageQuestion, page: UsagePage, names: Sequence[str], values: list[Any]
) -> str:
    if page.after is None:
        return "true"
    beyond = "<" if page.newest_first else ">"
    places = [_place(values, value) for value in _read_id(question, page.after)]
    condition = f"({', '.join(names)}) {beyond} ({', '.join(places)})"
    # Said once more of the time alone: partitions are found by this, not by the row.
    return condition if question.unit is None else f"bucket {beyond}= {places[0]} and {condition}"


def _to_json(question: UsageQuestion, row: asyncpg.Record) -> dict[str, Any]:
    values = [row[name] for name in _selected(question)]
    return {
        "id": _id(values),
        "object": "usage",
        **{
            name: _group_to_json(value)
            for name, value in zip(_groups(question), values, strict=True)
        },
        **{name: _measure(row[name]) for name in MEASURES},
    }


def _group_to_json(value: Any) -> str | None:
    if isinstance(value, datetime):
        return value.isoformat()
    return None if value in ("", _NO_KEY) else str(value)


def _measure(value: int | float | None) -> int | float | None:
    return round(value, 3) if isinstance(value, float) else value


def _id(values: Sequence[Any]) -> str:
    """Return the id of a row: its groups. It names the same row whatever is added meanwhile."""
    return base64.urlsafe_b64encode(orjson.dumps(values, default=str)).decode().rstrip("=")


def _read_id(question: UsageQuestion, text: str) -> list[Any]:
    kinds = [parse_time] * (question.unit is not None) + [
        uuid.UUID if group is By.KEY else str for group in question.by
    ]
    try:
        values = orjson.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise ValueError
        return [kind(value) for kind, value in zip(kinds, values, strict=True)]
    except (ValueError, OverflowError, binascii.Error):
        message = "`after` must be the `id` of a row of the same question."
        raise InvalidRequest(message, param="after") from None


def _query() -> str:
    return named_queries("serve_app.usage", "queries.sql")["page"].rstrip(";")
