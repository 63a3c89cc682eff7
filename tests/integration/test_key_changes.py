"""Revocation is heard by every gateway at once, and within a second whatever breaks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import asyncpg
import pytest

from serve_app.audit.act import Actor
from serve_app.database import connect
from serve_app.errors import AuthenticationFailed
from serve_app.identity.api_key_verifier import ApiKeyVerifier
from serve_app.identity.api_keys import ApiKey, ApiKeyStore, KeyTerms, prefix_of
from serve_app.identity.authenticator import build_pool
from serve_app.identity.key_changes import KeyListener, listen_to
from serve_app.lazy_pool import LazyPool
from serve_app.records import utc_now
from serve_app.settings import PostgresSettings
from tests.integration.command_line import comp_ai
from tests.integration.fakes import until
from tests.integration.links import Link

ROOT = Actor(id="root", kind="operator")
HOUR_S = 3600.0


class CountingStore(ApiKeyStore):
    """Counts how often the table is asked."""

    def __init__(self, pool: LazyPool) -> None:
        super().__init__(pool)
        self.asked = 0

    async def find(self, prefixes: Collection[str]) -> dict[str, ApiKey]:
        self.asked += 1
        return await super().find(prefixes)


class Node:
    """What one gateway has for API keys."""

    def __init__(self, settings: PostgresSettings, link: PostgresSettings, fresh_s: float) -> None:
        self.pool = build_pool(settings)
        self.store = CountingStore(self.pool)
        self.listener = listen_to(link)
        self.verifier = ApiKeyVerifier(
            self.store, self.listener, fresh_s=fresh_s, recheck_s=HOUR_S, flush_s=HOUR_S
        )

    async def refuses(self, plain: str) -> bool:
        """Tell whether the key is refused now."""
        try:
            await self.verifier.verify(plain)
        except AuthenticationFailed:
            return True
        return False


@asynccontextmanager
async def nodes(
    settings: PostgresSettings,
    count: int = 2,
    *,
    link: PostgresSettings | None = None,
    fresh_s: float = 1.0,
) -> AsyncIterator[list[Node]]:
    """Run gateways' verifiers that listen; `link` is how their listeners reach PostgreSQL."""
    made = [Node(settings, link or settings, fresh_s) for _ in range(count)]
    for node in made:
        node.verifier.start()
    await until(lambda: all(node.listener.watch for node in made))
    try:
        yield made
    finally:
        for node in made:
            await node.verifier.close()
            await node.pool.close()


@pytest.fixture
async def store(database: PostgresSettings) -> AsyncIterator[ApiKeyStore]:
    pool = build_pool(database)
    yield ApiKeyStore(pool)
    await pool.close()


async def new_key(store: ApiKeyStore) -> tuple[str, ApiKey]:
    return await store.create(KeyTerms(name="ci"), owner="ada", by=ROOT)


async def refused_everywhere(made: list[Node], plain: str, what: str) -> float:
    """Wait until every node refuses the key; return and print how long it took."""
    begun_s = time.perf_counter()

    async def refused(node: Node) -> None:
        while not await node.refuses(plain):  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.002)

    async with asyncio.timeout(20):
        await asyncio.gather(*(refused(node) for node in made))
    took_s = time.perf_counter() - begun_s
    print(f"{what}: refused everywhere after {took_s * 1000:.0f} ms")
    return took_s


ENDINGS = {
    "revoked": "update comp_ai.api_keys set revoked_at = now() where prefix = $1",
    "expired": "update comp_ai.api_keys set expires_at = now() where prefix = $1",
    "deleted": "delete from comp_ai.api_keys where prefix = $1",
    "another secret": "update comp_ai.api_keys set secret_hash = sha256('x') where prefix = $1",
    "another prefix": "update comp_ai.api_keys set prefix = 'x' where prefix = $1",
}


@pytest.mark.parametrize("statement", ENDINGS.values(), ids=ENDINGS)
async def test_an_end_by_sql_is_heard(
    database: PostgresSettings, store: ApiKeyStore, connection: asyncpg.Connection, statement: str
) -> None:
    plain, _ = await new_key(store)
    # What is known would be believed for an hour: only the notice can end it.
    async with nodes(database, fresh_s=HOUR_S) as made:
        assert [await node.refuses(plain) for node in made] == [False, False]
        await connection.execute(statement, prefix_of(plain))
        await refused_everywhere(made, plain, statement)


async def test_an_emptied_table_is_heard(
    database: PostgresSettings, store: ApiKeyStore, connection: asyncpg.Connection
) -> None:
    plain, _ = await new_key(store)
    async with nodes(database, fresh_s=HOUR_S) as made:
        assert not await made[0].refuses(plain)
        await connection.execute("truncate comp_ai.api_keys")
        await refused_everywhere(made, plain, "truncate")


async def test_a_revocation_by_the_command_line_is_heard(
    database: PostgresSettings, store: ApiKeyStore
) -> None:
    plain, key = await new_key(store)
    async with nodes(database, fresh_s=HOUR_S) as made:
        assert [await node.refuses(plain) for node in made] == [False, False]
        revoking = asyncio.to_thread(comp_ai, database, "keys", "revoke", key.prefix)
        assert str(key.id) in (await revoking).stdout
        await refused_everywhere(made, plain, "comp-ai keys revoke")


async def test_a_change_of_what_a_key_may_is_heard(
    database: PostgresSettings, store: ApiKeyStore
) -> None:
    plain, key = await new_key(store)
    async with nodes(database, fresh_s=HOUR_S) as made:
        assert (await made[0].verifier.verify(plain)).models is None
        await store.change(key.id, {"models": frozenset({"small"})}, by=ROOT)

        async def narrowed(node: Node) -> None:
            while (await node.verifier.verify(plain)).models != {"small"}:  # noqa: ASYNC110
                await asyncio.sleep(0.002)

        async with asyncio.timeout(20):
            await asyncio.gather(*(narrowed(node) for node in made))


async def test_the_table_is_not_asked_each_second(
    database: PostgresSettings, store: ApiKeyStore
) -> None:
    plain, key = await new_key(store)
    async with nodes(database, 1) as [node]:
        assert not await node.refuses(plain)
        begun = node.listener.watch
        assert begun is not None
        until_s = begun.confirmed_at + 2.5
        await until(lambda: begun.confirmed_at > until_s)
        assert not await node.refuses(plain)
        # That it was used is no change of it.
        await store.mark_used({key.id: utc_now()})
        await until(lambda: begun.confirmed_at > until_s + 0.5)
        assert not await node.refuses(plain)
        assert node.listener.watch is begun
        assert node.store.asked == 1


async def test_a_killed_listener_hides_no_revocation(
    database: PostgresSettings, store: ApiKeyStore, connection: asyncpg.Connection
) -> None:
    plain, key = await new_key(store)
    async with nodes(database) as made:
        assert [await node.refuses(plain) for node in made] == [False, False]
        before = [node.listener.watch for node in made]
        killed = await connection.fetchval(
            "select count(pg_terminate_backend(pid)) from pg_stat_activity "
            "where application_name = 'comp-ai-key-changes' and datname = current_database()"
        )
        assert killed == 2
        await store.revoke(key.id, by=ROOT)
        await refused_everywhere(made, plain, "revoked with the listeners killed")
        # They come back, and hear again.
        await until(lambda: all(_new(n.listener, old) for n, old in zip(made, before, strict=True)))
        other, second = await new_key(store)
        assert [await node.refuses(other) for node in made] == [False, False]
        await store.revoke(second.id, by=ROOT)
        await refused_everywhere(made, other, "revoked with the listeners back")


def _new(listener: KeyListener, old: object) -> bool:
    return listener.watch is not None and listener.watch is not old


async def test_a_listener_that_is_cut_off_without_notice_hides_no_revocation(
    database: PostgresSettings, store: ApiKeyStore
) -> None:
    plain, key = await new_key(store)
    link = Link(database)
    await link.mend()
    async with nodes(database, link=link.settings) as made:
        assert [await node.refuses(plain) for node in made] == [False, False]
        link.silence()
        await store.revoke(key.id, by=ROOT)
        await refused_everywhere(made, plain, "revoked with the links silent")
        await until(lambda: all(node.listener.watch is None for node in made))
        await link.cut()


async def test_starts_while_postgresql_is_away(
    database: PostgresSettings, store: ApiKeyStore
) -> None:
    plain, _ = await new_key(store)
    link = Link(database)
    await link.mend()
    await link.cut()
    node = Node(database, link.settings, 1.0)
    node.verifier.start()
    assert not await node.refuses(plain)
    assert node.listener.watch is None
    await link.mend()
    await until(lambda: node.listener.watch is not None)
    await node.verifier.close()
    await node.pool.close()
    await link.cut()


async def test_a_pooler_that_passes_no_notices_on_is_found_out(database: PostgresSettings) -> None:
    class Deaf:
        """A connection through a pooler: LISTEN works, and nothing is ever heard."""

        def __init__(self, inner: asyncpg.Connection) -> None:
            self._inner = inner

        async def add_listener(self, channel: str, callback: Callable[..., None]) -> None:
            await self._inner.execute("select 1")

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

    opened = 0

    async def open_connection() -> Any:
        nonlocal opened
        opened += 1
        return Deaf(await connect(database, application_name="tests"))

    listener = KeyListener(open_connection, patience_s=0.1, retry_s=0.01)
    listener.start(lambda _prefix: None)
    await until(lambda: opened > 2)
    assert listener.watch is None
    await listener.close()


async def test_rotation_is_heard_and_the_overlap_ends(
    database: PostgresSettings, store: ApiKeyStore
) -> None:
    first, key = await new_key(store)
    async with nodes(database, fresh_s=HOUR_S) as made:
        assert [await node.refuses(first) for node in made] == [False, False]
        second, _ = await store.rotate(key.id, overlap=timedelta(hours=1), by=ROOT)
        for node in made:
            for plain in (first, second):
                assert (await node.verifier.verify(plain)).api_key_id == key.id
        third, _ = await store.rotate(key.id, overlap=timedelta(), by=ROOT)
        for plain in (first, second):
            await refused_everywhere(made, plain, "rotated without an overlap")
        assert [await node.refuses(third) for node in made] == [False, False]
        await store.revoke(key.id, by=ROOT)
        await refused_everywhere(made, third, "revoked after a rotation")


async def test_last_use_by_several_gateways_is_written_when_they_end(
    database: PostgresSettings, store: ApiKeyStore
) -> None:
    made_keys = [await new_key(store) for _ in range(5)]
    begun_at = utc_now()
    async with nodes(database, 3) as made:
        for node in made:
            for plain, _ in made_keys:
                await node.verifier.verify(plain)
        assert {key.last_used_at for key in await store.list()} == {None}
        # All at once, as in an update of the deployment.
        await asyncio.gather(*(node.verifier.close() for node in made))
    assert all(key.last_used_at and key.last_used_at >= begun_at for key in await store.list())
