"""The erasures that were made: tombstones without a name, and who asks whether there is one.

A tombstone holds what was made until `erased_at`. Records of that time may still be on their way,
in a spool or under way at the engine: they are written without text and without the name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Self
from uuid import UUID

from serve_app.accounts.sealing.subject_keys import SubjectKeys
from serve_app.records import RequestRecord
from serve_app.subjects.names import TAG_KEY, fit, tag_of
from serve_app.subjects.sql import query

if TYPE_CHECKING:
    import asyncpg

    from serve_app.audit.log import Connection


@dataclass(frozen=True, slots=True, kw_only=True)
class Erasure:
    """One erasure; `finished_at` is None where it was broken off."""

    id: UUID
    tag: bytes
    pseudonym: str
    erased_at: datetime
    finished_at: datetime | None

    @classmethod
    def of(cls, row: asyncpg.Record) -> Self:
        """Return the erasure in a row."""
        return cls(**{**dict(row), "id": UUID(int=row["id"].int), "tag": bytes(row["tag"])})


async def erasures_of(
    connection: Connection, keys: SubjectKeys, subjects: Collection[str]
) -> dict[str, list[Erasure]]:
    """Return the erasures of each of `subjects` that has some, the oldest first.

    Raises:
        RuntimeError: `connection` is not in a transaction.
    """
    # Without any the key is not asked for: there may be no master key to open it.
    if not subjects or not await connection.fetchval(query("any_erasure")):
        return {}
    key = await keys.service_key(connection, TAG_KEY)
    tags = {tag_of(key, subject): subject for subject in subjects}
    found: dict[str, list[Erasure]] = {}
    for row in await connection.fetch(query("erasures_of"), list(tags)):
        erasure = Erasure.of(row)
        found.setdefault(tags[erasure.tag], []).append(erasure)
    return found


async def without_erased(
    connection: Connection, keys: SubjectKeys, records: Sequence[RequestRecord]
) -> list[RequestRecord]:
    """Return `records`, those of erased subjects without text and name.

    No erasure begins before the transaction ends, so none overlooks what is written in it.

    Raises:
        RuntimeError: `connection` is not in a transaction.
    """
    await connection.execute(query("be_a_writer"))
    subjects = {fit(record.principal_id) for record in records if record.principal_id}
    erased = await erasures_of(connection, keys, subjects)
    return [_erased(record, erased) for record in records] if erased else list(records)


def _erased(record: RequestRecord, erased: Mapping[str, Sequence[Erasure]]) -> RequestRecord:
    for erasure in erased.get(fit(record.principal_id or ""), ()):
        if record.created_at <= erasure.erased_at:
            return replace(
                record,
                principal_id=erasure.pseudonym,
                client_address=None,
                request_id=str(record.id),
                request_body=None,
                response_text=None,
                # A client may have made its id.
                traceparent=None,
            )
    return record
