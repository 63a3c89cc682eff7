"""A pool whose connections come back as they went, however their use ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest

from serve_app.errors import StoreUnavailable
from serve_app.lazy_pool import LazyPool, build_pool
from tests.integration.links import Link

_NAME = "tests-lazy-pool"
_LAST_QUERY = "select query from pg_stat_activity where application_name = $1"
_ASLEEP = """
    select count(*) from pg_stat_activity
    where application_name = $1 and state = 'active' and query like '%pg_sleep%'
"""
_TIMEOUT_S = 30.0


@pytest.fixture
async def pool(link: Link) -> AsyncIterator[LazyPool]:
    pool = build_pool(link.settings, application_name=_NAME, max_size=1)
    yield pool
    await pool.close()


async def test_a_use_asks_nothing_but_its_own(
    pool: LazyPool, connection: asyncpg.Connection
) -> None:
    async with pool.connection() as lent:
        await lent.execute("select 'ours'")
    assert await connection.fetchval(_LAST_QUERY, _NAME) == "select 'ours'"


async def test_what_was_done_is_done_though_the_link_then_goes_silent(
    pool: LazyPool, link: Link, connection: asyncpg.Connection
) -> None:
    async with asyncio.timeout(_TIMEOUT_S), pool.connection() as lent:
        await lent.execute("create table comp_ai.lazy_pool_done ()")
        link.silence()
    assert await connection.fetchval("select to_regclass('comp_ai.lazy_pool_done') is not null")


async def test_a_transaction_that_is_left_open_is_ended(pool: LazyPool) -> None:
    async with pool.connection() as lent:
        await lent.execute("begin")
        await lent.execute("create table comp_ai.lazy_pool_left ()")
    async with pool.connection() as lent:
        assert await lent.fetchval("select to_regclass('comp_ai.lazy_pool_left') is null")


async def test_a_statement_that_takes_too_long_is_ended(
    pool: LazyPool, connection: asyncpg.Connection
) -> None:
    with pytest.raises(StoreUnavailable):
        async with pool.connection(timeout_s=0.2) as lent:
            await lent.execute("select pg_sleep(60)")
    assert await connection.fetchval(_ASLEEP, _NAME) == 0


async def test_a_use_that_is_cancelled_leaves_its_connection_to_the_next(
    pool: LazyPool, connection: asyncpg.Connection
) -> None:
    async def use() -> None:
        async with pool.connection() as lent:
            await lent.execute("select pg_sleep(60)")

    using = asyncio.create_task(use())
    async with asyncio.timeout(_TIMEOUT_S):
        while not await connection.fetchval(_ASLEEP, _NAME):  # noqa: ASYNC110  no event
            await asyncio.sleep(0.01)
    using.cancel()
    with pytest.raises(asyncio.CancelledError):
        await using
    async with asyncio.timeout(_TIMEOUT_S), pool.connection() as lent:
        assert await lent.fetchval("select 1") == 1


async def test_a_host_that_says_nothing_is_away(pool: LazyPool, link: Link) -> None:
    link.silence()
    async with asyncio.timeout(_TIMEOUT_S):
        with pytest.raises(StoreUnavailable):
            async with pool.connection():
                pytest.fail("lent")
