"""A PostgreSQL pool that is opened when it is first needed, and not asked while it is away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, TypeAlias

import asyncpg

from serve_app.backoff import Backoff
from serve_app.database import CONNECT_ERRORS, DatabaseUnavailable, create_pool
from serve_app.errors import InvalidRequest, StoreUnavailable, Unavailable
from serve_app.settings import PostgresSettings

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

logger = logging.getLogger(__name__)

Connection: TypeAlias = "PoolConnectionProxy[asyncpg.Record]"
Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"

# Of giving a connection back: a statement that was broken off is ended in it, or the connection.
_GIVE_BACK_S = 1.0
_CLOSE_S = 3.0


class LazyPool:
    """Lets the gateway start, and go on, while PostgreSQL is away.

    After a failure nothing is tried for up to `retry_s`, doubled up to `max_retry_s`, so that
    requests are answered at once instead of each waiting for a dead host. How long exactly is
    left to chance, so that the gateways do not all come back at once.

    Args:
        connect: opens the pool; called again after a failure.
        unavailable: what is raised while PostgreSQL is away.
        too_slow: what is raised where a statement was ended because it took too long; without it
            that is as if PostgreSQL were away.
        name: whose pool it is, in the log.
        timeout_s: limit of one use of a connection: the wait for it, and what is asked.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[Pool]],
        *,
        unavailable: type[Unavailable] = StoreUnavailable,
        too_slow: type[Unavailable] | None = None,
        name: str = "store",
        timeout_s: float = 10.0,
        retry_s: float = 1.0,
        max_retry_s: float = 8.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connect = connect
        self._unavailable = unavailable
        self._too_slow = too_slow
        self._name = name
        self._timeout_s = timeout_s
        self._backoff = Backoff(retry_s, max_retry_s)
        self._clock = clock
        self._pool: Pool | None = None
        self._opening = asyncio.Lock()
        self._retry_s = retry_s
        self._closed_until = 0.0
        self._down = False

    @asynccontextmanager
    async def connection(self, *, timeout_s: float | None = None) -> AsyncIterator[Connection]:
        """Lend a connection, for `timeout_s` where the pool's own limit does not fit.

        Raises:
            Unavailable: the class given to the pool: PostgreSQL cannot be reached, is too slow,
                or cannot answer.
            InvalidRequest: PostgreSQL refuses the values.
        """
        self._refuse_while_down()
        try:
            async with self._lent(timeout_s or self._timeout_s) as connection:
                yield connection
        except (asyncpg.IntegrityConstraintViolationError, asyncpg.DataError) as error:
            raise InvalidRequest("The database refuses these values.") from error
        except (DatabaseUnavailable, asyncpg.InternalClientError, *CONNECT_ERRORS) as error:
            if self._too_slow is not None and isinstance(error, asyncpg.QueryCanceledError):
                raise self._too_slow from error
            self._note_failure(error)
            raise self._unavailable(retry_after_s=self._retry_s) from error
        self._note_success()

    async def close(self) -> None:
        """Close the pool, if it was opened; connections that hang are dropped."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        try:
            async with asyncio.timeout(_CLOSE_S):
                await pool.close()
        except CONNECT_ERRORS:
            with contextlib.suppress(asyncpg.InterfaceError):
                pool.terminate()

    @asynccontextmanager
    async def _lent(self, timeout_s: float) -> AsyncIterator[Connection]:
        """Lend a connection, and take it back outside of the time: what it was lent for is done."""
        async with AsyncExitStack() as stack:
            async with asyncio.timeout(timeout_s):
                pool = await self._opened()
                connection = await pool.acquire()
                stack.push_async_callback(_give_back, pool, connection)
                yield connection

    async def _opened(self) -> Pool:
        if self._pool is not None:
            return self._pool
        async with self._opening:
            # Those who waited for a failed opening do not each repeat it.
            self._refuse_while_down()
            if self._pool is None:
                self._pool = await self._connect()
            return self._pool

    def _refuse_while_down(self) -> None:
        if self._down and self._clock() < self._closed_until:
            raise self._unavailable(retry_after_s=self._retry_s)

    def _note_failure(self, error: Exception) -> None:
        self._retry_s = self._backoff.next_s()
        self._closed_until = self._clock() + self._retry_s
        if not self._down:
            # The class only: a PostgreSQL message may quote the values of the query.
            logger.warning(
                "PostgreSQL is away for the %s: %s",
                self._name,
                type(error).__name__,
                extra={"action": f"{self._name}_database_down"},
            )
        self._down = True

    def _note_success(self) -> None:
        if self._down:
            logger.info(
                "PostgreSQL answers the %s again",
                self._name,
                extra={"action": f"{self._name}_database_up"},
            )
        self._down = False
        self._backoff.reset()


async def _give_back(pool: Pool, connection: Connection) -> None:
    """Give it back; asyncpg drops it where that fails, and nobody is told: the work is done."""
    with contextlib.suppress(asyncpg.InternalClientError, *CONNECT_ERRORS):
        await pool.release(connection, timeout=_GIVE_BACK_S)


def build_pool(
    settings: PostgresSettings,
    *,
    application_name: str,
    max_size: int,
    unavailable: type[Unavailable] = StoreUnavailable,
    name: str = "store",
    clock: Callable[[], float] = time.monotonic,
) -> LazyPool:
    """Return a pool of at most `max_size` connections; opens none."""

    async def connect() -> Pool:
        # No connection is made ahead: opening must work as far as the settings do.
        return await create_pool(
            settings, min_size=0, max_size=max_size, application_name=application_name
        )

    return LazyPool(connect, unavailable=unavailable, name=name, clock=clock)
