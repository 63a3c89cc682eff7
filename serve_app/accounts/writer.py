"""Writing records into PostgreSQL: whole batches, each row once and only once.

A batch is inserted in one transaction, with `on conflict do nothing`: repeating a batch after a
lost answer adds nothing. The refusals of a permission among them go into the audit log in the
same transaction, so each is there once too.
Texts are sealed in that transaction, too, with keys that nobody destroys before it ends; records
of a subject that was erased since they were made lose text and name.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import asyncpg

from serve_app.accounts.bodies import text_of
from serve_app.accounts.queries import queries
from serve_app.accounts.sealing.subject_keys import SubjectKeys
from serve_app.audit.log import AuditLog
from serve_app.audit.refusals import refusal_act
from serve_app.records import RequestRecord
from serve_app.subjects.erasures import without_erased

# The types in which values travel; PostgreSQL fits them into its columns, or says why not.
_TYPES = {
    "uuid.UUID": "uuid",
    "datetime": "timestamptz",
    "str": "text",
    "Outcome": "text",
    "PrincipalKind": "text",
    "bool": "boolean",
    "int": "bigint",
    "float": "double precision",
}
_BODY_COLUMNS = {"id": "uuid", "created_at": "timestamptz", "key_id": "uuid", "sealed": "bytea"}
_COLUMNS = {
    f.name: _TYPES[str(f.type).removesuffix(" | None")]
    for f in fields(RequestRecord)
    # Of the trace its id is enough, once the log has hung its own spans below.
    if f.name not in ("request_body", "response_text", "traceparent")
}
_COLUMNS["trace_id"] = "text"
# Column widths of the schema. A longer value is cut: the row matters more than its tail.
_WIDTHS = {"request_id": 128, "principal_id": 255, "model": 100}

# What PostgreSQL or asyncpg say when the row itself is at fault, and would be for ever.
_ROW_ERRORS = (
    asyncpg.DataError,
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.ProgramLimitExceededError,
    ValueError,  # asyncpg's own, and its encoders': a value does not fit the column's type
    OverflowError,
    TypeError,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteReport:
    """What became of a batch. Rows in neither place were in PostgreSQL before."""

    written: int = 0
    poison: list[tuple[uuid.UUID, str]] = field(default_factory=list)


async def prepare_session(connection: asyncpg.Connection) -> None:
    """Let PostgreSQL read the statements that will come again and again.

    Raises:
        asyncpg.PostgresError: the schema is not there yet.
    """
    for statement in (_insert_requests(), _insert_bodies()):
        await connection.prepare(statement)


async def write(
    connection: asyncpg.Connection, records: Sequence[RequestRecord], keys: SubjectKeys
) -> WriteReport:
    """Write `records`, each once; name those that PostgreSQL will never take.

    A bad row is found by halving the batch, so it costs about 2·log2(n) transactions.

    Raises:
        OSError, asyncpg.PostgresError, asyncpg.InterfaceError: PostgreSQL is away or
            refuses all of them; nothing is known to be written, repeat the batch.
        NoMasterKey, MasterKeyMissing, SealBroken: texts among them cannot be sealed.
    """
    if not records:
        return WriteReport()
    try:
        return WriteReport(written=await _write_together(connection, records, keys))
    except _ROW_ERRORS as error:
        if len(records) == 1:
            return WriteReport(poison=[(records[0].id, _reason(error))])
    half = len(records) // 2
    first = await write(connection, records[:half], keys)
    second = await write(connection, records[half:], keys)
    return WriteReport(written=first.written + second.written, poison=first.poison + second.poison)


async def _write_together(
    connection: asyncpg.Connection, records: Sequence[RequestRecord], keys: SubjectKeys
) -> int:
    async with connection.transaction():
        # In one order for all writers: two who write the same records must not wait for each other.
        records = sorted(records, key=lambda record: record.id)
        records = await without_erased(connection, keys, records)
        columns = [[_value(record, column) for record in records] for column in _COLUMNS]
        new = await connection.fetchrow(_insert_requests(), *columns)
        assert new is not None
        await _write_bodies(connection, [record for record in records if record.has_texts], keys)
        refused = set(new["refused"] or ())
        acts = [refusal_act(record) for record in records if record.id in refused]
        await AuditLog().append_all(connection, acts)
    return int(new["written"])


async def _write_bodies(
    connection: asyncpg.Connection, records: Sequence[RequestRecord], keys: SubjectKeys
) -> None:
    if not records:
        return
    sealed = await keys.seal(connection, [text_of(record) for record in records])
    rows = [
        (record.id, record.created_at, text.key_id, text.sealed)
        for record, text in zip(records, sealed, strict=True)
    ]
    await connection.execute(_insert_bodies(), *zip(*rows, strict=True))


def _insert_requests() -> str:
    return _query("insert_requests", _COLUMNS)


def _insert_bodies() -> str:
    return _query("insert_bodies", _BODY_COLUMNS)


def _query(name: str, columns: Mapping[str, str]) -> str:
    arrays = (f"${number}::{kind}[]" for number, kind in enumerate(columns.values(), 1))
    return queries()[name].format(columns=", ".join(columns), arrays=", ".join(arrays))


def _value(record: RequestRecord, column: str) -> Any:
    value = getattr(record, column)
    if not isinstance(value, str):
        return value
    # PostgreSQL's text cannot hold U+0000; U+FFFD stands for what could not be kept.
    text = value.replace("\x00", "\N{REPLACEMENT CHARACTER}")
    return text[: _WIDTHS.get(column)]


def _reason(error: Exception) -> str:
    """Say why a row was refused, without quoting it: the error's own text may."""
    sqlstate = getattr(error, "sqlstate", None)
    place = getattr(error, "constraint_name", None) or getattr(error, "column_name", None)
    return " ".join(str(part) for part in (type(error).__name__, sqlstate, place) if part)
