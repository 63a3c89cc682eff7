"""The words of batches and of their lines, in the form that is sealed.

A row of the time before has them in columns of plain text; they come out of it in the same form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from serve_app.accounts.sealing.cells import Cell, Row, cell
from serve_app.accounts.sealing.places import batch_place, line_place

_END = b"\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchWords:
    """What the owner of a batch says of it, and what was wrong with its input."""

    metadata: Mapping[str, str] | None = None
    errors: list[dict[str, Any]] | None = None

    @classmethod
    def load(cls, text: bytes | None) -> BatchWords:
        """Return the words in what `dump` wrote; of None there are none."""
        return cls() if text is None else cls(**orjson.loads(text))

    def dump(self) -> bytes:
        """Return them as they are sealed."""
        return orjson.dumps({"metadata": self.metadata, "errors": self.errors})


@dataclass(frozen=True, slots=True)
class LineWords:
    """The name that a line was given, and its request or, once it has one, its response."""

    custom_id: str
    content: bytes | None

    @classmethod
    def load(cls, text: bytes) -> LineWords:
        """Return the words in what `dump` wrote."""
        custom_id, _, content = text.partition(_END)
        return cls(orjson.loads(custom_id), content or None)

    def dump(self) -> bytes:
        """Return them as they are sealed: JSON has no line end of its own."""
        return orjson.dumps(self.custom_id) + _END + (self.content or b"")


def batch_words(row: Row) -> Cell:
    """Return the words in a row of `batches`, as it is stored."""
    if row["sealed"] is not None:
        return cell(row, batch_place(row["id"]))
    plain = {
        name: None if row[name] is None else orjson.loads(row[name])
        for name in ("metadata", "errors")
    }
    return BatchWords(**plain).dump()


def line_words(row: Row, plain: str) -> Cell:
    """Return the words in a row of `batch_lines`, as it is stored.

    `plain` is the column that holds the content where the row is of the time before.
    """
    if row["sealed"] is not None:
        return cell(row, line_place(row["batch_id"], row["number"]))
    return LineWords(row["custom_id"], row[plain]).dump()
