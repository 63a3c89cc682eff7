"""Appending to the audit log, in the transaction of the act itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from serve_app.audit.act import AuditAct
from serve_app.audit.chain import ENTRY_COLUMNS, Entry, Link, chained
from serve_app.records import utc_now
from serve_app.sql import named_queries

if TYPE_CHECKING:
    import asyncpg

    from serve_app.lazy_pool import Connection as PoolConnection

    Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | PoolConnection"

_COLUMNS = (*ENTRY_COLUMNS, "hash")


def query(name: str) -> str:
    """Return one query of the audit log."""
    return named_queries("serve_app.audit", "queries.sql")[name]


class AuditLog:
    """The audit log of one installation.

    Acts are appended in the transaction that does them, so there is neither an act without its
    row nor a row without its act. Append last: from there to the end of the transaction all
    others who append wait.
    """

    async def append(self, connection: Connection, act: AuditAct) -> None:
        """Add one act to the chain.

        Raises:
            RuntimeError: `connection` is not in a transaction.
            asyncpg.PostgresError: PostgreSQL refuses it; the transaction must be undone.
        """
        await self.append_all(connection, [act])

    async def append_all(self, connection: Connection, acts: Sequence[AuditAct]) -> None:
        """Add acts to the chain in their order, as `append` does."""
        if not acts:
            return
        entries = list(chained(await self.hold(connection), acts, utc_now()))
        rows = [(*_values(entry), entry.digest()) for entry in entries]
        await connection.executemany(_append(), rows)
        await connection.execute(query("move_head"), rows[-1][0], rows[-1][-1])

    async def hold(self, connection: Connection) -> Link:
        """Return the end of the chain, and let nobody else append before the transaction ends.

        Raises:
            RuntimeError: `connection` is not in a transaction.
        """
        if not connection.is_in_transaction():
            raise RuntimeError("an act and its audit row belong into one transaction")
        head = await connection.fetchrow(query("lock_head"))
        assert head is not None
        return Link(head["seq"], head["hash"])


def _append() -> str:
    places = ", ".join(f"${number}" for number in range(1, len(_COLUMNS) + 1))
    return query("append").format(columns=", ".join(_COLUMNS), places=places)


def _values(entry: Entry) -> tuple[object, ...]:
    return tuple(getattr(entry, name) for name in ENTRY_COLUMNS)
