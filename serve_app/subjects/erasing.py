"""Erasing a subject: the key first, then every row; the totals stay.

The steps are small transactions that find what is still there, so an erasure that is broken off
goes on where it was when it is asked for again. Only what was made before it began is erased.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import asyncpg

from serve_app.accounts.sealing.master_keys import MasterKeys, NoMasterKey
from serve_app.accounts.sealing.subject_keys import SubjectKeys
from serve_app.audit.act import Actor, AuditAct
from serve_app.audit.log import AuditLog
from serve_app.errors import UnderLegalHold
from serve_app.records import new_id, utc_now
from serve_app.sql import named_queries
from serve_app.subjects.erasures import Erasure, erasures_of
from serve_app.subjects.holds import list_holds
from serve_app.subjects.names import (
    TAG_KEY,
    checked,
    fit,
    in_accounts,
    new_pseudonym,
    of_account,
    tag_of,
)
from serve_app.subjects.sql import query

if TYPE_CHECKING:
    from serve_app.audit.log import Connection

BATCH_ROWS = 1000
BEGIN, FINISH = "subject.erase", "subject.erased"
# In this order: what can be read goes first. Pending usage goes before what it is folded into.
DELETED = ("responses", "idempotency_keys", "batches", "files")
RENAMED = (
    "api_keys",
    "api_keys_made_for_others",
    "requests",
    "usage_pending",
    "usage_minute",
    "usage_hour",
    "usage_day",
    "limit_usage",
    "legal_holds",
)
_USAGE = ("usage_minute", "usage_hour", "usage_day")
# So often a step is tried that PostgreSQL ends to break a deadlock.
_TRIES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Erased:
    """What an erasure did. `found` and `left` are rows by table, before and after.

    `resumed` tells that an earlier run was broken off, so that it did a part.
    """

    subject: str
    erasure: Erasure
    resumed: bool
    begun_at: datetime
    finished_at: datetime
    found: Mapping[str, int]
    done: Mapping[str, int]
    left: Mapping[str, int]


class Eraser:
    """Erases on one connection, which no other task may use meanwhile."""

    def __init__(
        self, connection: Connection, masters: MasterKeys, *, batch_rows: int = BATCH_ROWS
    ) -> None:
        self._connection = connection
        self._masters = masters
        self._keys = SubjectKeys(masters)
        self._batch_rows = batch_rows

    async def count(self, subject: str) -> dict[str, int]:
        """Return how many rows there are of `subject`, by table."""
        values = (fit(checked(subject)), in_accounts(subject))
        rows = await self._connection.fetch(_query("counts"), *values)
        return {row["place"]: row["rows"] for row in rows}

    async def erase(self, subject: str, by: Actor) -> Erased:
        """Erase `subject`; safe to repeat, and to go on with.

        Raises:
            InvalidRequest: no principal has such a name.
            UnderLegalHold: it is under a legal hold; nothing was changed.
            NoMasterKey: there is no master key, so nobody would know of the erasure later.
        """
        begun_at = utc_now()
        found = await self.count(subject)
        if not self._masters:
            raise NoMasterKey
        erasure, resumed = await self._begin(subject, by)
        done = {"subject_keys": 0 if resumed else found["subject_keys"]}
        for step in (*DELETED, *RENAMED):
            done[step] = await self._repeat(step, subject, erasure)
        finished_at = await self._finish(erasure, done, by)
        return Erased(
            subject=subject,
            erasure=erasure,
            resumed=resumed,
            begun_at=begun_at,
            finished_at=finished_at,
            found=found,
            done=done,
            left=await self.count(subject),
        )

    async def again(self, subject: str, erasure: Erasure) -> None:
        """Erase what is back of `subject` from before `erasure`; its key is not touched."""
        for step in (*DELETED, *RENAMED):
            await self._repeat(step, subject, erasure)

    async def _begin(self, subject: str, by: Actor) -> tuple[Erasure, bool]:
        """Set the tombstone and destroy the key in one step, or find the one that is there."""
        connection = self._connection
        async with connection.transaction():
            await connection.execute(query("keep_out_holds"))
            if await list_holds(connection, fit(subject)):
                raise UnderLegalHold
            await connection.execute(query("wait_for_writers"))
            for erasure in (await erasures_of(connection, self._keys, [subject])).get(subject, []):
                if erasure.finished_at is None:
                    return erasure, True
            key = await self._keys.service_key(connection, TAG_KEY)
            # Before the time of the tombstone is taken: whoever holds the key is waited for, so
            # what was sealed with it is of before, and is erased with the rest.
            await self._keys.destroy(connection, subject)
            values = (new_id(), tag_of(key, subject), new_pseudonym())
            row = await connection.fetchrow(query("begin_erasure"), *values)
            assert row is not None
            erasure = Erasure.of(row)
            await self._note(BEGIN, erasure, by, {})
        return erasure, False

    async def _repeat(self, step: str, subject: str, erasure: Erasure) -> int:
        name = in_accounts(subject) if step == "limit_usage" else fit(subject)
        total = 0
        while rows := await self._some(step, name, erasure):
            total += rows
        return total

    async def _some(self, step: str, name: str, erasure: Erasure) -> int:
        values = (name, erasure.pseudonym, erasure.erased_at, self._batch_rows)
        for tries_left in reversed(range(_TRIES)):
            try:
                return int(await self._connection.fetchval(_step(step), *values))
            except asyncpg.DeadlockDetectedError:
                if not tries_left:
                    raise
        raise AssertionError("the last try returns or raises")

    async def _finish(self, erasure: Erasure, done: Mapping[str, int], by: Actor) -> datetime:
        async with self._connection.transaction():
            finished_at: datetime = await self._connection.fetchval(
                query("finish_erasure"), erasure.id
            )
            await self._note(FINISH, erasure, by, {"rows": dict(done)})
        return finished_at

    async def _note(
        self, action: str, erasure: Erasure, by: Actor, more: Mapping[str, Any]
    ) -> None:
        # The log is for ever, so the name is not written there. Who has the key of the tags can
        # tell whose erasure it was.
        after = {"erasure": str(erasure.id), "tag": erasure.tag.hex(), **more}
        act = AuditAct(actor=by, action=action, target=erasure.pseudonym, after=after)
        await AuditLog().append(self._connection, act)


async def reapply_erasures(connection: Connection, masters: MasterKeys) -> int:
    """Erase again what rows of erased subjects came back, out of a backup; return of how many.

    `comp_ai_keys` must be that of today. A subject under a legal hold in the restored rows is
    erased all the same: its erasure was after that.

    Raises:
        MasterKeyMissing: the tags are under a master key that is not here.
    """
    keys = SubjectKeys(masters)
    eraser = Eraser(connection, masters)
    async with connection.transaction():
        erased = await erasures_of(connection, keys, await _subjects(connection))
    for subject, erasures in erased.items():
        for erasure in erasures:
            await eraser.again(subject, erasure)
    return len(erased)


async def _subjects(connection: Connection) -> set[str]:
    named = {row["subject"] for row in await connection.fetch(query("distinct_subjects"))}
    accounts = await connection.fetch(query("limit_accounts"))
    return (named | {of_account(row["account"]) for row in accounts}) - {""}


def _step(step: str) -> str:
    return _query("usage_by_time").format(table=step) if step in _USAGE else _query(step)


def _query(name: str) -> str:
    return named_queries("serve_app.subjects", "erase.sql")[name]
