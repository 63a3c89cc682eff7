"""Verification of the audit log: is each row as it was written, and is none missing?

The chain by itself finds what was changed by somebody who does not make it anew. Whoever can
write everything can make all hashes anew, the head too; that is found with a checkpoint, which
is kept where that one cannot write.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson

from serve_app.audit.chain import ENTRY_COLUMNS, START, Entry, Link
from serve_app.audit.log import query
from serve_app.records import utc_now

if TYPE_CHECKING:
    import asyncpg

    from serve_app.audit.log import Connection

# Of a log that was made anew each row is wrong; the first ones say enough.
MOST_FAULTS = 100
_PREFETCH_ROWS = 1000
_HASH_BYTES = 32


class FaultKind(enum.StrEnum):
    """What is wrong at one place of the chain."""

    CHANGED = "changed"  # the row is not what its hash was made of
    MISSING = "missing"  # a row or more that must be there
    UNLINKED = "unlinked"  # the row does not follow the one before it
    BEYOND_HEAD = "beyond_head"  # the row is behind the end of the chain
    HEAD = "head"  # the head does not name the hash of the last row
    CHECKPOINT = "checkpoint"  # the chain is not the one that the checkpoint was taken of


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong, and the number of the row where it shows."""

    seq: int
    kind: FaultKind
    message: str


@dataclass(slots=True, kw_only=True)
class Verdict:
    """What a verification found. `faults` holds the first `MOST_FAULTS` of `fault_count`."""

    rows: int = 0
    head: Link = START
    fault_count: int = 0
    faults: list[Fault] = field(default_factory=list)

    @property
    def intact(self) -> bool:
        """Whether nothing is wrong."""
        return self.fault_count == 0

    def add(self, seq: int, kind: FaultKind, message: str) -> None:
        """Note a fault."""
        self.fault_count += 1
        if len(self.faults) < MOST_FAULTS:
            self.faults.append(Fault(seq, kind, message))


async def verify(connection: Connection, checkpoint: Link | None = None) -> Verdict:
    """Read the whole log, oldest row first, and say what is wrong with it."""
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        head = await connection.fetchrow(query("head"))
        walk = _Walk(checkpoint)
        rows = query("all_rows").format(columns=", ".join((*ENTRY_COLUMNS, "hash")))
        async for row in connection.cursor(rows, prefetch=_PREFETCH_ROWS):
            walk.step(row)
    return walk.end(None if head is None else Link(head["seq"], head["hash"]))


class _Walk:
    """A way along the chain: the last link that was seen, and what was wrong until there."""

    def __init__(self, checkpoint: Link | None) -> None:
        self._checkpoint = checkpoint
        self._last = START
        self._verdict = Verdict()

    def step(self, row: asyncpg.Record) -> None:
        """Check the next row."""
        seq, found_hash = row["seq"], row["hash"]
        entry = Entry(**{name: row[name] for name in ENTRY_COLUMNS})
        if seq > self._last.seq + 1:
            self._missing(self._last.seq + 1, seq - 1)
        elif seq <= self._last.seq or entry.previous_hash != self._last.hash:
            self._verdict.add(seq, FaultKind.UNLINKED, "it does not follow the row before it")
        if entry.digest() != found_hash:
            self._verdict.add(seq, FaultKind.CHANGED, "it is not what its hash was made of")
        self._verdict.rows += 1
        self._last = Link(seq, found_hash)
        self._compare(self._last)

    def end(self, head: Link | None) -> Verdict:
        """Check the end of the chain; return what was found."""
        verdict, last = self._verdict, self._last
        verdict.head = last
        if head is None:
            verdict.add(last.seq, FaultKind.HEAD, "the head of the chain is gone")
        elif last.seq < head.seq:
            self._missing(last.seq + 1, head.seq)
        elif last.seq > head.seq:
            verdict.add(last.seq, FaultKind.BEYOND_HEAD, f"the chain ends at row {head.seq}")
        elif last.hash != head.hash:
            verdict.add(last.seq, FaultKind.HEAD, "the head of the chain has another hash")
        if self._checkpoint is not None and self._checkpoint.seq > last.seq:
            verdict.add(
                self._checkpoint.seq, FaultKind.CHECKPOINT, "the row of the checkpoint is gone"
            )
        return verdict

    def _missing(self, first: int, last: int) -> None:
        which = f"row {first} is" if first == last else f"rows {first} to {last} are"
        self._verdict.add(first, FaultKind.MISSING, f"{which} missing")

    def _compare(self, link: Link) -> None:
        checkpoint = self._checkpoint
        if checkpoint is not None and link.seq == checkpoint.seq and link.hash != checkpoint.hash:
            message = "it has another hash than when the checkpoint was taken"
            self._verdict.add(link.seq, FaultKind.CHECKPOINT, message)


def write_checkpoint(link: Link) -> bytes:
    """Return a checkpoint of `link` as JSON; the time in it is for people."""
    taken_at = utc_now().isoformat(timespec="seconds")
    return orjson.dumps({"seq": link.seq, "hash": link.hash.hex(), "taken_at": taken_at}) + b"\n"


def read_checkpoint(data: bytes) -> Link:
    """Return the link of a checkpoint.

    Raises:
        ValueError: `data` is no checkpoint.
    """
    raw: Any = orjson.loads(data)
    seq, digest = (raw.get("seq"), raw.get("hash")) if isinstance(raw, dict) else (None, None)
    if type(seq) is not int or seq < 0 or not isinstance(digest, str):
        raise ValueError("not a checkpoint")
    link = Link(seq, bytes.fromhex(digest))
    if len(link.hash) != _HASH_BYTES:
        raise ValueError("not a checkpoint")
    return link
