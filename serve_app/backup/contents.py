"""What a database holds: counted for a manifest, and again after a restore."""

from __future__ import annotations

import asyncpg

from serve_app.audit.log import query as audit_query
from serve_app.backup.errors import BackupError
from serve_app.backup.manifest import AuditHead, Contents
from serve_app.sql import named_queries


def query(name: str) -> str:
    """Return one query of the backups."""
    return named_queries("serve_app.backup", "queries.sql")[name]


async def read_contents(connection: asyncpg.Connection) -> Contents:
    """Return what there is; in a transaction that is all of one snapshot.

    Raises:
        BackupError: the schema is not there, or too old.
    """
    if not await connection.fetchval(query("has_installation")):
        raise BackupError("The schema is missing or too old. Run `comp-ai migrate`.")
    server = await connection.fetchrow(query("server"))
    head = await connection.fetchrow(audit_query("head"))
    if server is None or head is None:
        raise BackupError("The audit log has lost its head. Run `comp-ai audit verify`.")
    labels = await connection.fetch(query("migrations"))
    return Contents(
        installation=await connection.fetchval(query("installation")),
        server=f"{server['number'] // 10000}.{server['number'] % 10000}",
        role=server["owner"],
        migrations=tuple(row["label"] for row in labels),
        rows=await count_rows(connection),
        audit=AuditHead(seq=head["seq"], hash=head["hash"].hex()),
    )


async def count_rows(connection: asyncpg.Connection) -> dict[str, int]:
    """Return the number of rows by table of comp_ai."""
    names = [row["name"] for row in await connection.fetch(query("tables"), "comp_ai")]
    return {
        name: await connection.fetchval(f'select count(*) from comp_ai."{name}"')  # noqa: S608
        for name in names
    }
