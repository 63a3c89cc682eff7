"""Idempotency keys in a real PostgreSQL: who gets a key, for how long, and what becomes of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest

from serve_app.config import IdempotencyConfig
from serve_app.database import connect
from serve_app.errors import (
    AnswerNotKept,
    IdempotencyConflict,
    IdempotencyMismatch,
    StoreUnavailable,
)
from serve_app.lazy_pool import LazyPool, build_pool
from serve_app.settings import PostgresSettings
from serve_app.sql import named_queries
from serve_app.stored.idempotency import Claim, KeyUse, StoredAnswer
from serve_app.stored.sweeper import Sweeper
from tests.integration.conftest import PostgresServer
from tests.integration.locks import lock_awaited
from tests.sealing import VAULT

ANSWER = StoredAnswer(status=200, media_type="application/json", body=b'{"yes": true}')
# Long enough to never end in a test; the tests end it by hand.
LONG = IdempotencyConfig(claim_s=3600)
OLDER = "update comp_ai.idempotency_keys set claim_expires_at = now()"
RENEWED = "select (select claim_expires_at from comp_ai.idempotency_keys)"
PAST = "update comp_ai.idempotency_keys set expires_at = now()"


def use(body: bytes = b"{}", *, principal: str = "ada", route: str = "completions") -> KeyUse:
    return KeyUse.of(principal, "key-1", route, body)


@pytest.fixture
async def gateways(database: PostgresSettings) -> AsyncIterator[list[LazyPool]]:
    """The pools of two gateways."""
    pools = [build_pool(database, application_name=f"tests-{n}", max_size=8) for n in range(2)]
    yield pools
    for pool in pools:
        await pool.close()


@pytest.fixture
async def pool(gateways: list[LazyPool]) -> LazyPool:
    return gateways[0]


async def count(connection: asyncpg.Connection) -> int:
    found: int = await connection.fetchval("select count(*) from comp_ai.idempotency_keys")
    return found


async def until_true(connection: asyncpg.Connection, query: str, *args: object) -> None:
    """Return once `query` gives true."""
    async with asyncio.timeout(20):
        while not await connection.fetchval(query, *args):  # noqa: ASYNC110 - PostgreSQL's state
            await asyncio.sleep(0.005)


async def test_answer_is_sent_to_who_asks_again(pool: LazyPool) -> None:
    claim = Claim(pool, VAULT, LONG, use())
    assert await claim.take() is None
    await claim.keep(ANSWER)
    for _ in range(2):
        again = Claim(pool, VAULT, LONG, use())
        assert await again.take() == ANSWER
        await again.release()
    assert await Claim(pool, VAULT, LONG, use()).take() == ANSWER


async def test_of_many_at_once_on_two_gateways_one_gets_the_key(gateways: list[LazyPool]) -> None:
    async def attempt(number: int) -> bool:
        try:
            return await Claim(gateways[number % 2], VAULT, LONG, use()).take() is None
        except IdempotencyConflict:
            return False

    assert sum(await asyncio.gather(*(attempt(number) for number in range(40)))) == 1


async def test_another_body_or_route_is_a_mismatch(pool: LazyPool) -> None:
    assert await Claim(pool, VAULT, LONG, use()).take() is None
    for other in (use(b"[]"), use(route="embeddings")):
        with pytest.raises(IdempotencyMismatch):
            await Claim(pool, VAULT, LONG, other).take()


async def test_each_principal_has_its_own_keys(pool: LazyPool) -> None:
    assert await Claim(pool, VAULT, LONG, use(principal="ada")).take() is None
    assert await Claim(pool, VAULT, LONG, use(b"[]", principal="grace")).take() is None


async def test_released_key_is_free(pool: LazyPool, connection: asyncpg.Connection) -> None:
    claim = Claim(pool, VAULT, LONG, use())
    await claim.take()
    await claim.release()
    await claim.release()
    assert await count(connection) == 0
    assert await Claim(pool, VAULT, LONG, use(b"another")).take() is None


async def test_claim_of_a_dead_gateway_ends_and_cannot_disturb(
    gateways: list[LazyPool], connection: asyncpg.Connection
) -> None:
    dead = Claim(gateways[0], VAULT, LONG, use())
    assert await dead.take() is None
    with pytest.raises(IdempotencyConflict):
        await Claim(gateways[1], VAULT, LONG, use()).take()
    await connection.execute(OLDER)
    heir = Claim(gateways[1], VAULT, LONG, use())
    assert await heir.take() is None
    # It was not dead after all: neither its answer nor its release may touch the heir's claim.
    await dead.keep(StoredAnswer(status=200, media_type="text/plain", body=b"late"))
    await dead.release()
    with pytest.raises(IdempotencyConflict):
        await Claim(gateways[0], VAULT, LONG, use()).take()
    await heir.keep(ANSWER)
    assert await Claim(gateways[0], VAULT, LONG, use()).take() == ANSWER


async def test_claim_is_renewed_while_it_is_held(
    pool: LazyPool, connection: asyncpg.Connection
) -> None:
    claim = Claim(pool, VAULT, IdempotencyConfig(claim_s=0.05), use())
    await claim.take()
    for _ in range(3):
        expiry = await connection.fetchval("select claim_expires_at from comp_ai.idempotency_keys")
        await until_true(connection, f"{RENEWED} > $1", expiry)
    await claim.keep(ANSWER)
    assert await Claim(pool, VAULT, LONG, use()).take() == ANSWER


async def test_renewal_survives_a_cut(pool: LazyPool, connection: asyncpg.Connection) -> None:
    claim = Claim(pool, VAULT, IdempotencyConfig(claim_s=0.05), use())
    await claim.take()
    await connection.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'tests-0'"
    )
    # The second renewal that is seen began after the cut.
    for _ in range(2):
        expiry = await connection.fetchval("select claim_expires_at from comp_ai.idempotency_keys")
        await until_true(connection, f"{RENEWED} > $1", expiry)
    await claim.release()
    assert await count(connection) == 0


async def test_answer_past_its_time_is_generated_again(
    pool: LazyPool, connection: asyncpg.Connection
) -> None:
    claim = Claim(pool, VAULT, LONG, use())
    await claim.take()
    await claim.keep(ANSWER)
    await connection.execute(PAST)
    assert await Claim(pool, VAULT, LONG, use(b"another body")).take() is None


async def test_time_counts_from_the_answer(pool: LazyPool, connection: asyncpg.Connection) -> None:
    config = IdempotencyConfig(claim_s=3600, keep_s=1000)
    claim = Claim(pool, VAULT, config, use())
    await claim.take()
    await connection.execute(PAST)
    await claim.keep(ANSWER)
    left_s = await connection.fetchval(
        "select extract(epoch from expires_at - now())::float8 from comp_ai.idempotency_keys"
    )
    assert 900 < left_s <= 1000


async def test_answer_at_the_cap_is_kept_and_a_longer_one_is_not(
    pool: LazyPool, connection: asyncpg.Connection
) -> None:
    config = IdempotencyConfig(max_stored_bytes=len(ANSWER.body), claim_s=3600)
    claim = Claim(pool, VAULT, config, use())
    await claim.take()
    await claim.keep(ANSWER)
    assert await Claim(pool, VAULT, config, use()).take() == ANSWER
    longer = Claim(pool, VAULT, config, use(principal="grace"))
    await longer.take()
    await longer.keep(
        StoredAnswer(status=200, media_type="application/json", body=ANSWER.body + b" ")
    )
    with pytest.raises(AnswerNotKept):
        await Claim(pool, VAULT, config, use(principal="grace")).take()
    kept = "select sealed from comp_ai.idempotency_keys where principal_id = 'grace'"
    assert await connection.fetchval(kept) is None


async def test_take_that_is_cancelled_leaves_nothing_after_release(
    database: PostgresSettings, connection: asyncpg.Connection
) -> None:
    pool = build_pool(database, application_name="tests-cancel", max_size=2)
    # Another transaction holds the row's place, so that the claim waits in PostgreSQL.
    blocker = await connect(database, application_name="tests-blocker")
    block = blocker.transaction()
    await block.start()
    await blocker.execute(
        "insert into comp_ai.idempotency_keys values "
        "('ada', 'key-1', 'r', sha256(''), 'claimed', gen_random_uuid(), now(), "
        "null, null, null, now(), now())"
    )
    claim = Claim(pool, VAULT, LONG, use())
    taking = asyncio.create_task(claim.take())
    await lock_awaited(database)
    taking.cancel()
    await asyncio.wait([taking])
    await block.rollback()
    await blocker.close()
    await claim.release()
    assert await count(connection) == 0
    assert await Claim(pool, VAULT, LONG, use()).take() is None
    await pool.close()


async def test_answer_is_kept_through_a_cut(pool: LazyPool, connection: asyncpg.Connection) -> None:
    claim = Claim(pool, VAULT, LONG, use())
    await claim.take()
    await connection.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'tests-0'"
    )
    await claim.keep(ANSWER)
    assert await Claim(pool, VAULT, LONG, use()).take() == ANSWER


async def test_without_postgres_a_key_is_refused_and_the_end_is_quiet(
    own_server: PostgresServer,
) -> None:
    pool = build_pool(own_server.embedded.settings(), application_name="tests", max_size=2)
    kept, released = (
        Claim(pool, VAULT, LONG, use()),
        Claim(pool, VAULT, LONG, use(principal="grace")),
    )
    assert await kept.take() is None
    assert await released.take() is None
    own_server.kill()
    await kept.keep(ANSWER)
    await released.release()
    with pytest.raises(StoreUnavailable) as refusal:
        await Claim(pool, VAULT, LONG, use()).take()
    assert refusal.value.retry_after_s is not None
    await pool.close()


async def test_sweeper_removes_what_is_past_its_time_and_nothing_else(
    gateways: list[LazyPool], connection: asyncpg.Connection
) -> None:
    fill = """
        insert into comp_ai.idempotency_keys
        select $1, 'key-' || n, 'r', sha256(''), 'answered', gen_random_uuid(), now(),
               200, 'text/plain', '', now(), now() + $2 * interval '1 second'
        from generate_series(1, 25) as n
    """
    await connection.execute(fill, "old", -1)
    await connection.execute(fill, "new", 1000)
    sweepers = [Sweeper(pool, batch_rows=10) for pool in gateways]
    removed = await asyncio.gather(*(sweeper.sweep() for sweeper in sweepers))
    assert sum(removed) == 25
    assert await connection.fetch("select distinct principal_id from comp_ai.idempotency_keys") == [
        ("new",)
    ]


async def test_sweeper_works_by_itself(pool: LazyPool, connection: asyncpg.Connection) -> None:
    claim = Claim(pool, VAULT, LONG, use())
    await claim.take()
    await claim.keep(ANSWER)
    await connection.execute(PAST)
    sweeper = Sweeper(pool, every_s=0.01)
    sweeper.start()
    await until_true(connection, "select count(*) = 0 from comp_ai.idempotency_keys")
    await sweeper.close()


async def test_sweep_uses_the_index(connection: asyncpg.Connection) -> None:
    await connection.execute("set enable_seqscan = off")
    sweep = named_queries("serve_app.stored", "idempotency.sql")["sweep"].replace("$1", "500")
    plan = "\n".join(row[0] for row in await connection.fetch(f"explain {sweep}"))
    assert "idempotency_keys_by_expiry" in plan
