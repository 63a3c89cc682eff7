"""Finding requests in the accounts: what is kept of them beside their texts."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeAlias

import asyncpg

from serve_app.errors import InvalidRequest
from serve_app.lazy_pool import Connection as PoolConnection
from serve_app.records import Outcome
from serve_app.sql import named_queries

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | PoolConnection"

# Without the columns of the service's own bookkeeping.
COLUMNS = (
    "id created_at request_id route status outcome error_code principal_id principal_kind "
    "api_key_id client_address model stream finish_reason prompt_tokens completion_tokens "
    "cost_micros auth_ms limits_ms queue_ms time_to_first_token_ms inter_token_mean_ms "
    "duration_ms replica_id denied trace_id recorded_at".split()
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFilter:
    """Which requests are wanted. `since` is the first moment, `until` the first one after."""

    principal: str | None = None
    key: uuid.UUID | None = None
    model: str | None = None
    outcome: Outcome | None = None
    status: int | None = None
    request_id: str | None = None
    since: datetime | None = None
    until: datetime | None = None


async def search(
    connection: Connection, wanted: RequestFilter, *, limit: int, after: uuid.UUID | None = None
) -> list[dict[str, Any]]:
    """Return the newest requests, beyond that with the id `after`, ready for JSON.

    Raises:
        InvalidRequest: there is no request with the id `after`.
    """
    place = None
    if after is not None:
        created_at = await connection.fetchval(_query("place"), after)
        if created_at is None:
            raise InvalidRequest("`after` must be the `id` of a request here.", param="after")
        place = (created_at, after)
    sql, values = search_sql(wanted, limit=limit, place=place)
    return [_to_json(row) for row in await connection.fetch(sql, *values)]


def search_sql(
    wanted: RequestFilter, *, limit: int, place: tuple[datetime, uuid.UUID] | None = None
) -> tuple[str, list[Any]]:
    """Return the statement of a page and its values."""
    values: list[Any] = []

    def place_of(value: Any) -> str:
        values.append(value)
        return f"${len(values)}"

    conditions = [
        f"{column} {operator} {place_of(value)}"
        for column, operator, value in _conditions(wanted)
        if value is not None
    ]
    if wanted.outcome is not None:
        # As a constant, which tells that the index of what did not complete is enough.
        conditions.append(f"outcome = '{wanted.outcome.value}'")
    if wanted.status is not None:
        conditions.append(f"status = {wanted.status:d}")
    if place is not None:
        # Said once more of the time alone: partitions are found by this, not by the row.
        beyond, last_id = place_of(place[0]), place_of(place[1])
        conditions.append(f"created_at <= {beyond} and (created_at, id) < ({beyond}, {last_id})")
    sql = _query("page").format(
        columns=", ".join(COLUMNS),
        wanted=" and ".join(conditions) or "true",
        limit=place_of(limit),
    )
    return sql, values


def _conditions(wanted: RequestFilter) -> list[tuple[str, str, Any]]:
    return [
        ("principal_id", "=", wanted.principal),
        ("api_key_id", "=", wanted.key),
        ("model", "=", wanted.model),
        ("request_id", "=", wanted.request_id),
        ("created_at", ">=", wanted.since),
        ("created_at", "<", wanted.until),
    ]


async def read_request(connection: Connection, request: uuid.UUID) -> dict[str, Any] | None:
    """Return what is kept of one request beside its texts, ready for JSON; None: there is none."""
    row = await connection.fetchrow(_query("one").format(columns=", ".join(COLUMNS)), request)
    return None if row is None else _to_json(row)


async def read_body(
    connection: Connection, request: uuid.UUID, created_at: datetime
) -> dict[str, Any] | None:
    """Return the row of a request's texts, sealed or not; None where none are kept."""
    row = await connection.fetchrow(_query("body"), request, created_at)
    return None if row is None else dict(row)


def _to_json(row: asyncpg.Record) -> dict[str, Any]:
    return {"object": "request", **{name: _value(row[name]) for name in COLUMNS}}


def _value(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat(timespec="microseconds")
    return str(value) if isinstance(value, uuid.UUID) else value


def _query(name: str) -> str:
    return named_queries("serve_app.search", "queries.sql")[name].rstrip(";")
