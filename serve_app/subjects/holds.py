"""Legal holds: whose data must stay, whatever retention and erasure say."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Self

from serve_app.audit.act import Actor, AuditAct
from serve_app.audit.log import AuditLog
from serve_app.errors import InvalidRequest, NotFound
from serve_app.records import new_id
from serve_app.subjects.names import checked
from serve_app.subjects.sql import query

if TYPE_CHECKING:
    import asyncpg

    from serve_app.audit.log import Connection

MAX_REASON_CHARS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class LegalHold:
    """One hold; it is in force while `released_at` is None."""

    id: str
    subject: str
    reason: str
    set_by: str
    set_at: datetime
    released_by: str | None
    released_at: datetime | None

    @classmethod
    def of(cls, row: asyncpg.Record) -> Self:
        """Return the hold in a row."""
        return cls(**{**dict(row), "id": str(row["id"])})

    def to_json(self) -> dict[str, Any]:
        """Return it for JSON."""
        released_at = self.released_at
        return {
            "id": self.id,
            "object": "legal_hold",
            "subject": self.subject,
            "reason": self.reason,
            "set_by": self.set_by,
            "set_at": self.set_at.isoformat(),
            "released_by": self.released_by,
            "released_at": None if released_at is None else released_at.isoformat(),
        }


async def list_holds(
    connection: Connection, subject: str | None = None, *, released_too: bool = False
) -> list[LegalHold]:
    """Return the holds in force, the oldest first; with `released_too` all of them."""
    rows = await connection.fetch(query("holds"), subject, released_too)
    return [LegalHold.of(row) for row in rows]


async def set_hold(connection: Connection, subject: str, reason: str, by: Actor) -> LegalHold:
    """Put `subject` under a hold; its row of the audit log comes with it.

    Raises:
        InvalidRequest: it is under one already, or the name or the reason cannot be kept.
    """
    if not 0 < len(reason) <= MAX_REASON_CHARS or not reason.isprintable():
        message = f"Give a reason of 1 to {MAX_REASON_CHARS} printable characters."
        raise InvalidRequest(message, param="reason")
    async with connection.transaction():
        values = (new_id(), checked(subject), reason, by.id[:255])
        row = await connection.fetchrow(query("set_hold"), *values)
        if row is None:
            raise InvalidRequest("The subject is under a legal hold already.", param="subject")
        return await _noted(connection, "subject.hold", row, by)


async def release_hold(connection: Connection, subject: str, by: Actor) -> LegalHold:
    """End the hold on `subject`; its row of the audit log comes with it.

    Raises:
        NotFound: it is under none.
    """
    async with connection.transaction():
        row = await connection.fetchrow(query("release_hold"), checked(subject), by.id[:255])
        if row is None:
            raise NotFound("The subject is under no legal hold.", param="subject")
        return await _noted(connection, "subject.release", row, by)


async def _noted(connection: Connection, action: str, row: asyncpg.Record, by: Actor) -> LegalHold:
    hold = LegalHold.of(row)
    act = AuditAct(actor=by, action=action, target=hold.subject, after=hold.to_json())
    await AuditLog().append(connection, act)
    return hold
