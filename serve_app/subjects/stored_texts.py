"""What a person stored and uploaded, opened for an export: texts in the place of their seals."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from serve_app.accounts.sealing.cells import Cell, cell, open_cells
from serve_app.accounts.sealing.places import chunk_place, line_place
from serve_app.accounts.sealing.subject_keys import SubjectKeys
from serve_app.batches.files import filename_of
from serve_app.batches.results import ANSWERED
from serve_app.batches.words import BatchWords, LineWords, batch_words
from serve_app.stored.idempotency import stored_answer
from serve_app.stored.responses import response_texts

if TYPE_CHECKING:
    from serve_app.audit.log import Connection

DESTROYED = {"texts": "destroyed"}
_SEALS = frozenset(("key_id", "sealed", "items_key_id", "sealed_items"))
_Row: TypeAlias = Mapping[str, Any]
_Texts: TypeAlias = Sequence[bytes | None]


async def open_stored(
    connection: Connection, keys: SubjectKeys, kind: str, subject: str, rows: Sequence[_Row]
) -> list[dict[str, Any]]:
    """Return `rows`, all of one kind of an export, with their texts and without seals.

    Raises:
        MasterKeyMissing, SealBroken: see `SubjectKeys`.
    """
    if kind not in _CELLS:
        return [dict(row) for row in rows]
    cells = [_CELLS[kind](row, subject) for row in rows]
    opened = iter(await open_cells(connection, keys, [one for of in cells for one in of]))
    return [
        _with_texts(kind, row, of, [next(opened) for _ in of])
        for row, of in zip(rows, cells, strict=True)
    ]


def _with_texts(kind: str, row: _Row, cells: Sequence[Cell], texts: _Texts) -> dict[str, Any]:
    bare = {name: value for name, value in row.items() if name not in _SEALS}
    if not any(cells):
        return bare
    if any(one is not None and text is None for one, text in zip(cells, texts, strict=True)):
        return {**bare, **DESTROYED}
    return {**bare, **_COLUMNS[kind](row, *texts)}


_CELLS: dict[str, Callable[[_Row, str], Sequence[Cell]]] = {
    "response": lambda row, _: response_texts(row),
    "idempotency_answer": lambda row, subject: [stored_answer(row, subject, row["key"])],
    "file": lambda row, _: [filename_of(row)],
    "file_chunk": lambda row, _: [_chunk(row)],
    "batch": lambda row, _: [batch_words(row)],
    "batch_line": lambda row, _: [cell(row, line_place(row["batch_id"], row["number"]))],
}


def _chunk(row: _Row) -> Cell:
    return cell(row, chunk_place(row["file_id"], row["number"]), plain="content")


def _words_of_batch(_: _Row, text: bytes) -> dict[str, Any]:
    words = BatchWords.load(text)
    return {"metadata": words.metadata, "errors": words.errors}


def _words_of_line(row: _Row, text: bytes) -> dict[str, Any]:
    words = LineWords.load(text)
    name = "response" if row["state"] in ANSWERED else "body"
    return {"custom_id": words.custom_id, name: words.content}


def _base64_of_chunk(_: _Row, content: bytes) -> dict[str, Any]:
    return {"content_base64": base64.b64encode(content).decode()}


_COLUMNS: dict[str, Callable[..., dict[str, Any]]] = {
    "response": lambda _, response, items: {"response": response, "input_items": items},
    "idempotency_answer": lambda _, answer: {"answer": answer},
    "file": lambda _, filename: {"filename": filename},
    "file_chunk": _base64_of_chunk,
    "batch": _words_of_batch,
    "batch_line": _words_of_line,
}
