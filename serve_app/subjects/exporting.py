"""All that is kept of one subject, as JSON Lines: one object with its `kind` a line.

It is read through cursors in one snapshot, so memory is bounded by a few rows. The last line has
the kind `end` and counts the lines before it; an export without it was cut off.
"""

from __future__ import annotations

import base64
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import orjson

from serve_app.accounts.bodies import Body, open_bodies
from serve_app.accounts.sealing.subject_keys import SubjectKeys
from serve_app.audit.act import Actor, AuditAct
from serve_app.audit.log import AuditLog
from serve_app.records import utc_now
from serve_app.sql import named_queries
from serve_app.subjects.names import checked, fit, in_accounts
from serve_app.subjects.stored_texts import DESTROYED, open_stored

if TYPE_CHECKING:
    from serve_app.audit.log import Connection

EXPORT = "subject.export"
MEDIA_TYPE = "application/x-ndjson"
_KINDS = (
    "api_key",
    "request",
    "response",
    "idempotency_answer",
    "file",
    "file_chunk",
    "batch",
    "batch_line",
    "usage_pending",
    "usage_minute",
    "usage_hour",
    "usage_day",
    "limit_usage",
    "audit",
)
# In memory at once. A row may be as large as a request may be.
_ROWS = 16
# Columns whose text is JSON.
_JSON = frozenset(
    ("response", "input_items", "principal", "metadata", "errors", "limits", "before", "after")
)


async def note_export(connection: Connection, subject: str, by: Actor) -> None:
    """Write into the audit log that `subject` is exported; before anything goes out.

    Raises:
        InvalidRequest: no principal has such a name.
    """
    async with connection.transaction():
        act = AuditAct(actor=by, action=EXPORT, target=checked(subject))
        await AuditLog().append(connection, act)


async def export(connection: Connection, subject: str, keys: SubjectKeys) -> AsyncGenerator[bytes]:
    """Yield the lines, each with its end; of a text whose key is gone the line says so.

    Raises:
        MasterKeyMissing, SealBroken: a text does not open.
    """
    lines = 1
    yield _line({"kind": "subject", "subject": subject, "exported_at": utc_now()})
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        # Who reads it may be slow, and a transaction that only reads is in nobody's way.
        await connection.execute("set local idle_in_transaction_session_timeout = 0")
        for kind in _KINDS:
            async for rows in _batches(connection, kind, subject):
                bodies = await _bodies(connection, rows, keys) if kind == "request" else {}
                stored = await open_stored(connection, keys, kind, subject, rows)
                for row in stored:
                    lines += 1
                    texts = bodies[row["id"]] if bodies and row["id"] in bodies else {}
                    yield _line({"kind": kind, **_readable(row), **texts})
    yield _line({"kind": "end", "lines": lines})


async def _batches(
    connection: Connection, kind: str, subject: str
) -> AsyncIterator[Sequence[Mapping[str, Any]]]:
    cursor = await connection.cursor(_query(kind), fit(subject), in_accounts(subject))
    while rows := await cursor.fetch(_ROWS):
        yield [dict(row) for row in rows]


async def _bodies(
    connection: Connection, requests: Sequence[Mapping[str, Any]], keys: SubjectKeys
) -> dict[uuid.UUID, dict[str, Any]]:
    """Return what is kept of the texts of `requests`, by their ids."""
    times = [row["created_at"] for row in requests]
    values = ([row["id"] for row in requests], min(times), max(times))
    rows = [dict(row) for row in await connection.fetch(_query("bodies"), *values)]
    opened = await open_bodies(connection, keys, rows)
    return {row["id"]: _texts(body) for row, body in zip(rows, opened, strict=True)}


def _texts(body: Body | None) -> dict[str, Any]:
    if body is None:
        return DESTROYED
    return {"request_text": body.request, "response_text": body.response}


def _readable(row: Mapping[str, Any]) -> dict[str, Any]:
    return dict(_cell(name, value) for name, value in row.items())


def _cell(name: str, value: Any) -> tuple[str, Any]:
    if isinstance(value, bytes):
        try:
            return name, _parsed(name, value.decode())
        except UnicodeDecodeError:
            return f"{name}_base64", base64.b64encode(value).decode()
    return name, _parsed(name, value) if isinstance(value, str) else value


def _parsed(name: str, text: str) -> Any:
    if name not in _JSON:
        return text
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return text


def _line(value: Mapping[str, Any]) -> bytes:
    return orjson.dumps(value, default=_plain, option=orjson.OPT_APPEND_NEWLINE)


def _plain(value: Any) -> Any:
    # asyncpg has a UUID class of its own.
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _query(name: str) -> str:
    return named_queries("serve_app.subjects", "export.sql")[name]
