"""The chain of hashes: what is hashed, and in which form.

The hash of a row is the SHA-256 of a JSON array in the form of RFC 8785 (no spaces, UTF-8): the
word `comp-ai-audit-1`, then the columns of the row in the order of `Entry`, `hash` left out. Times
are in UTC as `2026-01-31T23:59:59.000000+00:00`, hashes in lower-case hexadecimal, and `before`
and `after` are the texts as they stand in the table. The first row follows 32 zero bytes.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any

import orjson

from serve_app.audit.act import AuditAct

_FORM = "comp-ai-audit-1"


@dataclass(frozen=True, slots=True)
class Link:
    """A place in the chain: the number of a row and its hash (32 bytes)."""

    seq: int
    hash: bytes


START = Link(0, bytes(32))


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One row of `comp_ai.audit_log`; the order of the fields is part of the hash."""

    seq: int
    at: datetime
    recorded_at: datetime
    actor_id: str
    actor_kind: str
    api_key_id: uuid.UUID | None
    action: str
    target: str | None
    before: str | None
    after: str | None
    client_address: str | None
    request_id: str | None
    previous_hash: bytes

    def digest(self) -> bytes:
        """Return the SHA-256 (32 bytes) of this row."""
        values = [_plain(getattr(self, name)) for name in ENTRY_COLUMNS]
        return hashlib.sha256(orjson.dumps([_FORM, *values])).digest()


ENTRY_COLUMNS = tuple(f.name for f in fields(Entry))


def chained(head: Link, acts: Iterable[AuditAct], recorded_at: datetime) -> Iterator[Entry]:
    """Yield the rows of `acts` that follow `head`."""
    for act in acts:
        entry = _entry(head, act, recorded_at)
        head = Link(entry.seq, entry.digest())
        yield entry


def _entry(head: Link, act: AuditAct, recorded_at: datetime) -> Entry:
    actor = act.actor
    return Entry(
        seq=head.seq + 1,
        at=act.at,
        recorded_at=recorded_at,
        actor_id=_storable(actor.id),
        actor_kind=actor.kind,
        api_key_id=actor.api_key_id,
        action=act.action,
        target=_text(act.target),
        before=_json(act.before),
        after=_json(act.after),
        client_address=_text(actor.client_address),
        request_id=_text(actor.request_id),
        previous_hash=head.hash,
    )


def _plain(value: Any) -> int | str | None:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="microseconds")
    if isinstance(value, uuid.UUID):
        return str(value)
    assert value is None or isinstance(value, int | str)
    return value


def _text(value: str | None) -> str | None:
    return None if value is None else _storable(value)


def _storable(text: str) -> str:
    """Return `text` as PostgreSQL can hold it: without U+0000 and halves of surrogate pairs."""
    whole = text.encode("utf-8", "replace").decode("utf-8")
    return whole.replace("\x00", "\N{REPLACEMENT CHARACTER}")


def _json(value: Mapping[str, Any] | None) -> str | None:
    if value is None:
        return None
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode("utf-8")
