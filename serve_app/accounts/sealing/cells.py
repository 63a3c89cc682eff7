"""Texts in the columns of a row: sealed, or in the clear in a row of the time before."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from serve_app.accounts.sealing.subject_keys import SealedText, SubjectKeys

if TYPE_CHECKING:
    from serve_app.audit.log import Connection

# Sealed, in the clear, or not there.
Cell: TypeAlias = SealedText | bytes | None
# A row, as asyncpg has it.
Row: TypeAlias = Any


def cell(
    row: Row,
    place: bytes,
    *,
    plain: str | None = None,
    sealed: str = "sealed",
    key_id: str = "key_id",
) -> Cell:
    """Return the text that `row` has at `place`; each name is that of a column."""
    if row[sealed] is not None:
        # asyncpg has a UUID class of its own.
        return SealedText(uuid.UUID(int=row[key_id].int), place, bytes(row[sealed]))
    value = None if plain is None else row[plain]
    return value.encode() if isinstance(value, str) else value


async def open_cells(
    connection: Connection, keys: SubjectKeys, cells: Sequence[Cell]
) -> list[bytes | None]:
    """Return the texts in their order; None where there is none, or its key was destroyed.

    Raises:
        MasterKeyMissing, SealBroken: see `SubjectKeys`.
    """
    sealed = [one for one in cells if isinstance(one, SealedText)]
    opened = iter(await keys.open(connection, sealed) if sealed else ())
    return [next(opened) if isinstance(one, SealedText) else one for one in cells]
