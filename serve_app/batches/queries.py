"""The SQL of files and batches, read from queries.sql."""

from __future__ import annotations

from serve_app.sql import named_queries


def query(name: str) -> str:
    """Return one query."""
    return named_queries("serve_app.batches", "queries.sql")[name]
