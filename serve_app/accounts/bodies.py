"""The bodies of requests as PostgreSQL keeps them: sealed with the key of whose they are."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from serve_app.accounts.sealing.subject_keys import SealedText, SubjectKeys, Text
from serve_app.records import RequestRecord

if TYPE_CHECKING:
    from serve_app.audit.log import Connection


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """What is kept of one request's prompt and answer."""

    request: str | None
    response: str | None


def text_of(record: RequestRecord) -> Text:
    """Return the texts of `record`, ready to be sealed."""
    texts = {"request": record.request_body, "response": record.response_text}
    return Text(record.principal_id, _place(record.id), orjson.dumps(texts))


async def open_bodies(
    connection: Connection, keys: SubjectKeys, rows: Sequence[Mapping[str, Any]]
) -> list[Body | None]:
    """Return the texts in rows of `request_bodies`, in their order; None where the key is gone.

    A row needs `id`, `request_body`, `response_text`, `key_id` and `sealed`. One of the time
    before bodies were sealed is read from its plain columns.

    Raises:
        MasterKeyMissing, SealBroken: see `SubjectKeys`.
    """
    sealed = [
        SealedText(_uuid(row["key_id"]), _place(_uuid(row["id"])), bytes(row["sealed"]))
        for row in rows
        if row["sealed"] is not None
    ]
    opened = iter(await keys.open(connection, sealed))
    return [_plain(row) if row["sealed"] is None else _read(next(opened)) for row in rows]


def _plain(row: Mapping[str, Any]) -> Body:
    return Body(request=row["request_body"], response=row["response_text"])


def _read(opened: bytes | None) -> Body | None:
    return None if opened is None else Body(**orjson.loads(opened))


def _place(row_id: uuid.UUID) -> bytes:
    return b"request_bodies:" + row_id.bytes


def _uuid(value: Any) -> uuid.UUID:
    # asyncpg has a UUID class of its own.
    return uuid.UUID(int=value.int)
