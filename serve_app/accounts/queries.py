"""The SQL of the accounts, read from queries.sql."""

from __future__ import annotations

from serve_app.sql import named_queries


def queries() -> dict[str, str]:
    """Return the queries by name."""
    return named_queries("serve_app.accounts", "queries.sql")
