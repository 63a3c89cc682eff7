"""Rotation of the master key: the keys of subjects are wrapped anew, the texts stay as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serve_app.accounts.sealing.master_keys import MasterKeyMissing, MasterKeys
from serve_app.accounts.sealing.subject_keys import wrap_anew
from serve_app.audit.act import Actor, AuditAct
from serve_app.audit.log import AuditLog
from serve_app.sql import named_queries

if TYPE_CHECKING:
    import asyncpg

_BATCH_ROWS = 1000


async def rotate(
    connection: asyncpg.Connection, masters: MasterKeys, by: Actor, batch_rows: int = _BATCH_ROWS
) -> int:
    """Wrap all keys with the current master key; return how many were wrapped with another.

    Each batch is a transaction with a row of the audit log. Safe to repeat and to run twice.

    Raises:
        NoMasterKey: there is none.
        MasterKeyMissing: some keys need a master key that is not here; the others are done.
        SealBroken: a row was changed.
    """
    total = 0
    while done := await _rotate_some(connection, masters, by, batch_rows):
        total += done
    missing = (await wrapped_by(connection)).keys() - set(masters.ids)
    if missing:
        raise MasterKeyMissing(", ".join(sorted(missing)))
    return total


async def wrapped_by(connection: asyncpg.Connection) -> dict[str, int]:
    """Return how many keys each master key wraps, by its id."""
    rows = await connection.fetch(_query("count_by_master"))
    return {row["master_key_id"]: row["keys"] for row in rows}


async def _rotate_some(
    connection: asyncpg.Connection, masters: MasterKeys, by: Actor, batch_rows: int
) -> int:
    current = masters.current_id
    others = [name for name in masters.ids if name != current]
    async with connection.transaction():
        rows = await connection.fetch(_query("lock_outdated"), others, batch_rows)
        if not rows:
            return 0
        wrapped = [wrap_anew(masters, row) for row in rows]
        await connection.execute(_query("rewrap"), current, [row["id"] for row in rows], wrapped)
        await AuditLog().append(connection, _act(by, current, rows))
    return len(rows)


def _act(by: Actor, current: str, rows: list[asyncpg.Record]) -> AuditAct:
    before = {"master_keys": sorted({row["master_key_id"] for row in rows})}
    after = {"keys": len(rows)}
    return AuditAct(
        actor=by, action="master_key.rotate", target=current, before=before, after=after
    )


def _query(name: str) -> str:
    return named_queries("serve_app.accounts.sealing", "queries.sql")[name]
