"""The SQL of the rights of subjects."""

from __future__ import annotations

from serve_app.sql import named_queries


def query(name: str) -> str:
    """Return one query of queries.sql."""
    return named_queries("serve_app.subjects", "queries.sql")[name]
