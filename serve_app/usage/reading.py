"""Reading usage in pages."""

from __future__ import annotations

import base64
import binascii
import uuid
from collections.abc import Mapping, Sequence
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
    numbers = [str(number) for number, _ in enumerate(_selected(question), start=1)]
    direction = "desc" if page.newest_first else "asc"
    parts = _Parts(
        wanted=_wanted(question, values),
        after=[_place(values, value) for value in _after(question, page)],
        numbers=", ".join(numbers),
        order=", ".join(f"{number} {direction}" for number in numbers),
        limit=_place(values, page.limit),
    )
    sql = _query("page").format(
        names="".join(f"{name}, " for name in _selected(question)),
        folded=parts.of(question, f"usage_{table_unit}{suffix}", table_unit),
        pending=parts.of(question, "usage_pending", Unit.MINUTE),
        numbers=parts.numbers,
        order=parts.order,
        limit=parts.limit,
    )
    return UsageStatement(question, sql, tuple(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """What the statements of both tables have in common."""

    wanted: list[str]
    after: list[str]
    numbers: str
    order: str
    limit: str

    def of(self, question: UsageQuestion, table: str, table_unit: Unit) -> str:
        """Return the statement of one table, whose times are of `table_unit`."""
        groups = dict(zip(_selected(question), _selected(question), strict=True))
        exact = question.unit is None or table_unit is question.unit
        if not exact:
            groups["bucket"] = f"date_trunc('{question.unit}', bucket, 'UTC')"
        return _query("groups").format(
            groups="".join(f"{value} as {name}, " for name, value in groups.items()),
            table=table,
            wanted=" and ".join([*self.wanted, *self._beyond(groups, exact=exact)]),
            numbers=self.numbers,
            order=self.order,
            limit=self.limit,
        )

    def _beyond(self, groups: Mapping[str, str], *, exact: bool) -> list[str]:
        if not self.after:
            return []
        beyond = "<" if "desc" in self.order else ">"
        row = f"({', '.join(groups.values())}) {beyond} ({', '.join(self.after)})"
        if not exact or "bucket" not in groups:
            return [row]
        # Said once more of the time alone: partitions are found by this, not by the row.
        return [f"bucket {beyond}= {self.after[0]}", row]


def _groups(question: UsageQuestion) -> list[str]:
    return [START] * (question.unit is not None) + [str(group) for group in question.by]


def _selected(question: UsageQuestion) -> list[str]:
    return ["bucket"] * (question.unit is not None) + [_COLUMNS[group] for group in question.by]


def _place(values: list[Any], value: Any) -> str:
    values.append(value)
    return f"${len(values)}"


def _wanted(question: UsageQuestion, values: list[Any]) -> list[str]:
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
    return conditions


def _after(question: UsageQuestion, page: UsagePage) -> list[Any]:
    return [] if page.after is None else _read_id(question, page.after)


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


def _query(name: str) -> str:
    return named_queries("serve_app.usage", "queries.sql")[name].rstrip(";")
