"""Reading for reports: from a replica where there is one, from the primary where it is away."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from serve_app.database import create_pool
from serve_app.errors import QueryTooSlow, Unavailable
from serve_app.lazy_pool import Connection, LazyPool, Pool
from serve_app.settings import PostgresSettings

_Result = TypeVar("_Result")

# Beyond the timeout of a statement, which is to end it first and keeps the connection.
_GRACE_S = 2.0


class ReadPool:
    """Asks questions that may take long, beside the pools that requests need to be served.

    Args:
        primary: a pool to the primary, of reads alone.
        replica: one to a read replica, or None.
    """

    def __init__(self, primary: LazyPool, replica: LazyPool | None = None) -> None:
        self._primary = primary
        self._replica = replica

    async def read(self, ask: Callable[[Connection], Awaitable[_Result]]) -> _Result:
        """Return what `ask` finds; it may be asked twice, so it must only read.

        Raises:
            StoreUnavailable: neither answers.
            QueryTooSlow: it took longer than a statement may.
            InvalidRequest: PostgreSQL refuses the values.
        """
        if self._replica is not None:
            try:
                async with self._replica.connection() as connection:
                    return await ask(connection)
            except QueryTooSlow:
                raise  # the primary would take as long
            except Unavailable:
                pass  # the pool has said so in the log
        async with self._primary.connection() as connection:
            return await ask(connection)

    async def close(self) -> None:
        """Close both."""
        await self._primary.close()
        if self._replica is not None:
            await self._replica.close()


def build_read_pool(settings: PostgresSettings, *, application_name: str) -> ReadPool:
    """Return the pool that `settings` say; opens no connection."""
    replica = settings.read_replica
    return ReadPool(
        _pool(settings, application_name, "reports"),
        None if replica is None else _pool(replica, application_name, "read_replica"),
    )


def _pool(settings: PostgresSettings, application_name: str, name: str) -> LazyPool:
    async def connect() -> Pool:
        return await create_pool(
            settings,
            min_size=0,
            max_size=settings.read_pool_size,
            application_name=application_name,
            statement_timeout_s=settings.read_timeout_s,
            server_settings={
                "default_transaction_read_only": "on",
                # Which partitions and indexes are good is said by the values.
                "plan_cache_mode": "force_custom_plan",
            },
        )

    return LazyPool(
        connect,
        too_slow=QueryTooSlow,
        name=name,
        timeout_s=settings.read_timeout_s + _GRACE_S,
    )
