"""Reading the audit log in pages."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import orjson

from serve_app.audit.chain import ENTRY_COLUMNS
from serve_app.audit.log import query

if TYPE_CHECKING:
    import asyncpg

    from serve_app.audit.log import Connection


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditFilter:
    """Which rows are wanted. `since` is the first moment, `until` the first one after."""

    actor: str | None = None
    action: str | None = None
    since: datetime | None = None
    until: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditPage:
    """Where a page begins, behind row `after`, and how many rows it has."""

    limit: int
    after: int | None = None
    newest_first: bool = True


async def read_page(
    connection: Connection, wanted: AuditFilter, page: AuditPage
) -> list[dict[str, Any]]:
    """Return the rows of a page, ready for JSON."""
    text = query("page").format(
        columns=", ".join((*ENTRY_COLUMNS, "hash")),
        beyond="<" if page.newest_first else ">",
        order="desc" if page.newest_first else "asc",
    )
    rows = await connection.fetch(
        text, wanted.actor, wanted.action, wanted.since, wanted.until, page.after, page.limit
    )
    return [_to_json(row) for row in rows]


def _to_json(row: asyncpg.Record) -> dict[str, Any]:
    return {
        "id": str(row["seq"]),
        "object": "audit.entry",
        "at": row["at"].isoformat(timespec="microseconds"),
        "recorded_at": row["recorded_at"].isoformat(timespec="microseconds"),
        "actor": {
            "id": row["actor_id"],
            "kind": row["actor_kind"],
            "api_key_id": None if row["api_key_id"] is None else str(row["api_key_id"]),
        },
        "action": row["action"],
        "target": row["target"],
        "before": _read(row["before"]),
        "after": _read(row["after"]),
        "client_address": row["client_address"],
        "request_id": row["request_id"],
        "previous_hash": row["previous_hash"].hex(),
        "hash": row["hash"].hex(),
    }


def _read(text: str | None) -> Any:
    if text is None:
        return None
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        # Only somebody who changed the row wrote this; the verification says so.
        return text
