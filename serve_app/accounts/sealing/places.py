"""The places that texts are bound to: a table, a column where it has several, and a row.

None of them can be taken for another, so that a text that is copied elsewhere does not open.
"""

from __future__ import annotations

import orjson


def response_place(response_id: str) -> bytes:
    """Return the place of a stored response."""
    return _place("responses", response_id)


def response_items_place(response_id: str) -> bytes:
    """Return the place of the items of a stored response's request."""
    return _place("responses.input_items", response_id)


def answer_place(principal_id: str, key: str) -> bytes:
    """Return the place of the answer that is kept under an idempotency key."""
    return _place("idempotency_keys", principal_id, key)


def filename_place(file_id: str) -> bytes:
    """Return the place of the name of a file."""
    return _place("files", file_id)


def chunk_place(file_id: str, number: int) -> bytes:
    """Return the place of one chunk of a file."""
    return _place("file_chunks", file_id, number)


def batch_place(batch_id: str) -> bytes:
    """Return the place of what a batch says in words."""
    return _place("batches", batch_id)


def line_place(batch_id: str, number: int) -> bytes:
    """Return the place of one line of a batch."""
    return _place("batch_lines", batch_id, number)


def _place(table: str, *row: str | int) -> bytes:
    return orjson.dumps([table, *row])
