"""A PostgreSQL pool that is opened when it is first needed, and not asked while it is away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeAlias

import asyncpg

from serve_app.database import CONNECT_ERRORS, DatabaseUnavailable
from serve_app.errors import IdentityUnavailable, InvalidRequest

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

logger = logging.getLogger(__name__)

Connection: TypeAlias = "PoolConnectionProxy[asyncpg.Record]"
Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"


class LazyPool:
    """Lets the gateway start, and go on, while PostgreSQL is away.

    After a failure nothing is tried for `retry_s`, doubled up to `max_retry_s`, so that requests
    are answered at once from what is cached instead of each waiting for a dead host.

    Args:
        connect: opens the pool; called again after a failure.
        timeout_s: limit of one use of a connection, opening included.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[Pool]],
        *,
        timeout_s: float = 3.0,
        retry_s: float = 0.5,
        max_retry_s: float = 4.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connect = connect
        self._timeout_s = timeout_s
        self._first_retry_s = retry_s
        self._max_retry_s = max_retry_s
        self._clock = clock
        self._pool: Pool | None = None
        self._opening = asyncio.Lock()
        self._retry_s = retry_s
        self._closed_until = 0.0
        self._down = False

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """Lend a connection.

        Raises:
            IdentityUnavailable: PostgreSQL cannot be reached, is too slow, or cannot answer.
            InvalidRequest: PostgreSQL refuses the values.
        """
        self._refuse_while_down()
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                (await self._opened()).acquire() as connection,
            ):
                yield connection
        except (asyncpg.IntegrityConstraintViolationError, asyncpg.DataError) as error:
            raise InvalidRequest("The database refuses these values.") from error
        except (DatabaseUnavailable, *CONNECT_ERRORS) as error:
            self._note_failure(error)
            raise IdentityUnavailable(retry_after_s=self._retry_s) from error
        self._note_success()

    async def close(self) -> None:
        """Close the pool, if it was opened; connections that hang are dropped."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                await pool.close()
        except CONNECT_ERRORS:
            with contextlib.suppress(asyncpg.InterfaceError):
                pool.terminate()

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
            raise IdentityUnavailable(retry_after_s=self._retry_s)

    def _note_failure(self, error: Exception) -> None:
        self._retry_s = (
            min(self._retry_s * 2, self._max_retry_s) if self._down else self._first_retry_s
        )
        self._closed_until = self._clock() + self._retry_s
        if not self._down:
            # The class only: a PostgreSQL message may quote the values of the query.
            logger.warning(
                "the accounts cannot be read: %s",
                type(error).__name__,
                extra={"action": "identity_database_down"},
            )
        self._down = True

    def _note_success(self) -> None:
        if self._down:
            logger.info("the accounts answer again", extra={"action": "identity_database_up"})
        self._down = False
