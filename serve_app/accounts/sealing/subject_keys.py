"""The keys of subjects: one for each principal, kept wrapped in PostgreSQL.

A key that is destroyed is never used again: who seals holds its row until its transaction ends,
and looks it up anew each time. What is remembered between is only what a row unwraps to.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from serve_app.accounts.sealing.aead import KEY_BYTES, Sealer
from serve_app.accounts.sealing.master_keys import MasterKeys
from serve_app.records import new_id
from serve_app.sql import named_queries

if TYPE_CHECKING:
    from serve_app.audit.log import Connection

# A row of `subject_keys`, as asyncpg has it.
Row: TypeAlias = Any

_SUBJECT, _SERVICE = "subject", "service"
# Whose text it is where nobody is named.
_NOBODY = "nobody"
_MAX_SUBJECT_CHARS = 255


@dataclass(frozen=True, slots=True)
class Text:
    """A text that is to be sealed: whose it is, and the place that it is bound to.

    `place` is the table and the row, in bytes. A subject of None is nobody known.
    """

    subject: str | None
    place: bytes
    plain: bytes


@dataclass(frozen=True, slots=True)
class SealedText:
    """A text under a subject's key."""

    key_id: uuid.UUID
    place: bytes
    sealed: bytes


class SubjectKeys:
    """Seals and opens with the keys of subjects.

    Every method raises MasterKeyMissing where a key was wrapped with a master key that is not
    here, and SealBroken where its row was changed.
    """

    def __init__(self, masters: MasterKeys, *, remembered: int = 4096) -> None:
        self._masters = masters
        self._most = remembered
        self._sealers: OrderedDict[uuid.UUID, Sealer] = OrderedDict()

    async def seal(self, connection: Connection, texts: Sequence[Text]) -> list[SealedText]:
        """Seal `texts`, making the keys of new subjects.

        Raises:
            RuntimeError: `connection` is not in a transaction.
            NoMasterKey: a subject is new, and there is no master key.
        """
        named = [text.subject for text in texts if text.subject is not None]
        keys = await self._hold(connection, _SUBJECT, {_fit(name) for name in named})
        if len(named) < len(texts):
            keys[None] = (await self._hold(connection, _SERVICE, {_NOBODY}))[_NOBODY]
        work = [
            (text, *keys[None if text.subject is None else _fit(text.subject)]) for text in texts
        ]
        return await asyncio.to_thread(_seal_all, work)

    async def open(self, connection: Connection, texts: Sequence[SealedText]) -> list[bytes | None]:
        """Return what was sealed, in the same order; None where the key was destroyed."""
        ids = list({text.key_id for text in texts})
        rows = await connection.fetch(_query("find_keys"), ids)
        sealers = {_id(row): self._sealer(row) for row in rows}
        return await asyncio.to_thread(_open_all, texts, sealers)

    async def destroy(self, connection: Connection, subject: str) -> int:
        """Destroy the keys of `subject`, so that nobody reads its texts; return how many.

        It waits for writers that hold them. One that comes later makes a new key.
        """
        return int(await connection.fetchval(_query("destroy_keys"), _fit(subject)))

    async def service_key(self, connection: Connection, name: str) -> bytes:
        """Return 32 random bytes that are the service's own, made at the first call.

        They outlast the master key, which only wraps them: for tags and signatures.

        Raises:
            RuntimeError: `connection` is not in a transaction.
        """
        (row,) = (await self._rows(connection, _SERVICE, {name})).values()
        return self._unwrap(row)

    async def _hold(
        self, connection: Connection, kind: str, subjects: Collection[str]
    ) -> dict[str | None, tuple[uuid.UUID, Sealer]]:
        rows = await self._rows(connection, kind, subjects)
        return {subject: (_id(row), self._sealer(row)) for subject, row in rows.items()}

    async def _rows(
        self, connection: Connection, kind: str, subjects: Collection[str]
    ) -> dict[str, Row]:
        """Return the rows of `subjects`, held until the transaction ends."""
        if not connection.is_in_transaction():
            raise RuntimeError("a key is held for the time of a transaction")
        wanted = sorted(subjects)
        found = await self._held(connection, kind, wanted)
        while missing := [subject for subject in wanted if subject not in found]:
            # Another writer may have made it, or an erasure destroyed it, in between.
            await self._add(connection, kind, missing)
            found |= await self._held(connection, kind, missing)
        return found

    async def _held(
        self, connection: Connection, kind: str, subjects: Sequence[str]
    ) -> dict[str, Row]:
        if not subjects:
            return {}
        rows = await connection.fetch(_query("hold_keys"), kind, subjects)
        return {row["subject"]: row for row in rows}

    async def _add(self, connection: Connection, kind: str, subjects: Sequence[str]) -> None:
        ids = [new_id() for _ in subjects]
        wrapped = [
            self._masters.wrap(os.urandom(KEY_BYTES), _place(key_id, kind, subject))[1]
            for key_id, subject in zip(ids, subjects, strict=True)
        ]
        await connection.execute(
            _query("add_keys"), kind, self._masters.current_id, ids, subjects, wrapped
        )

    def _sealer(self, row: Row) -> Sealer:
        key_id = _id(row)
        sealer = self._sealers.get(key_id)
        if sealer is None:
            sealer = self._sealers[key_id] = Sealer(self._unwrap(row))
        self._sealers.move_to_end(key_id)
        if len(self._sealers) > self._most:
            self._sealers.popitem(last=False)
        return sealer

    def _unwrap(self, row: Row) -> bytes:
        return unwrap(self._masters, row)


def unwrap(masters: MasterKeys, row: Row) -> bytes:
    """Return the key in a row of `subject_keys`. Raises MasterKeyMissing, SealBroken."""
    place = _place(row["id"], row["kind"], row["subject"])
    return masters.unwrap(row["master_key_id"], row["wrapped"], place)


def wrap_anew(masters: MasterKeys, row: Row) -> bytes:
    """Return the key in a row, wrapped with the current master key. Raises as `unwrap`."""
    place = _place(row["id"], row["kind"], row["subject"])
    return masters.wrap(unwrap(masters, row), place)[1]


def _seal_all(work: Sequence[tuple[Text, uuid.UUID, Sealer]]) -> list[SealedText]:
    return [
        SealedText(key_id, text.place, sealer.seal(text.plain, text.place + key_id.bytes))
        for text, key_id, sealer in work
    ]


def _open_all(
    texts: Sequence[SealedText], sealers: Mapping[uuid.UUID, Sealer]
) -> list[bytes | None]:
    return [
        sealer.open(text.sealed, text.place + text.key_id.bytes)
        if (sealer := sealers.get(text.key_id)) is not None
        else None
        for text in texts
    ]


def _place(key_id: uuid.UUID, kind: str, subject: str) -> bytes:
    return f"subject_keys:{key_id}:{kind}:{subject}".encode()


def _fit(subject: str) -> str:
    """Return the subject as the columns of a principal keep it: see the writer of records."""
    return subject.replace("\x00", "\N{REPLACEMENT CHARACTER}")[:_MAX_SUBJECT_CHARS]


def _id(row: Row) -> uuid.UUID:
    # asyncpg has a UUID class of its own.
    return uuid.UUID(int=row["id"].int)


def _query(name: str) -> str:
    return named_queries("serve_app.accounts.sealing", "queries.sql")[name]
