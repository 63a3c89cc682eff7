"""A changed policy is in the audit log once, however many gateways take it over."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson

from serve_app.audit.policy import PolicyJournal
from serve_app.database import connect
from serve_app.lazy_pool import LazyPool, build_pool
from serve_app.settings import PostgresSettings

FIRST, SECOND = ({"models": [{"name": name}]} for name in ("small", "large"))


def pool_of(postgres: PostgresSettings) -> LazyPool:
    return build_pool(postgres, application_name="tests-policy", max_size=2)


async def changes(postgres: PostgresSettings) -> list[tuple[Any, Any]]:
    connection = await connect(postgres, application_name="tests")
    rows = await connection.fetch(
        "select actor_id, actor_kind, action, target, before, after "
        "from comp_ai.audit_log order by seq"
    )
    await connection.close()
    said = {(row["actor_id"], row["actor_kind"], row["action"], row["target"]) for row in rows}
    assert said <= {("user_config", "comp-ai", "policy.change", "gateway")}
    return [(_policy(row["before"]), _policy(row["after"])) for row in rows]


def _policy(text: str | None) -> Any:
    return None if text is None else orjson.loads(text)["policy"]


async def test_each_change_is_noted_once_by_many_gateways(database: PostgresSettings) -> None:
    pools = [pool_of(database) for _ in range(4)]
    journals = [PolicyJournal(pool) for pool in pools]
    for policy in (FIRST, SECOND, FIRST):
        for journal in journals:
            journal.note(policy)
        await asyncio.gather(*(journal.written() for journal in journals))
    # One that starts later with the policy that holds adds nothing.
    late = PolicyJournal(pools[0])
    late.note(dict(FIRST))
    await late.written()
    for part in (*journals, late, *pools):
        await part.close()
    assert await changes(database) == [(None, FIRST), (FIRST, SECOND), (SECOND, FIRST)]


async def test_a_change_waits_until_postgresql_answers(database: PostgresSettings) -> None:
    tries = 0

    async def connect_late() -> Any:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise ConnectionRefusedError
        return await pool_of(database)._connect()

    pool = LazyPool(connect_late, retry_s=0.01, max_retry_s=0.02)
    journal = PolicyJournal(pool)
    journal.note(FIRST)
    journal.note(SECOND)
    await journal.written()
    assert await changes(database) == [(None, SECOND)]
    await journal.close()
    await pool.close()
    assert tries == 3
