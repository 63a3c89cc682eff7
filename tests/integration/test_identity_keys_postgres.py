"""API keys in a real PostgreSQL whose link can be cut."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import asyncpg
import pytest

from serve_app.errors import AuthenticationFailed, IdentityUnavailable
from serve_app.identity.api_key_verifier import ApiKeyVerifier
from serve_app.identity.api_keys import FIND_KEYS, ApiKeyStore, generate_key
from serve_app.identity.authenticator import build_authenticator, build_pool
from serve_app.identity.principal import Permission
from serve_app.lazy_pool import LazyPool
from serve_app.records import Outcome, RequestRecord, new_id, utc_now
from serve_app.settings import PostgresSettings, load_settings


@dataclass
class Link:
    """A TCP relay to PostgreSQL that can be cut and mended."""

    target: PostgresSettings
    port: int = 0
    _server: asyncio.Server | None = None
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    @property
    def settings(self) -> PostgresSettings:
        changes = {"host": "127.0.0.1", "port": self.port, "sslmode": "disable"}
        return self.target.model_copy(update=changes)

    async def mend(self) -> None:
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = self.target.host, self.target.port
        if host.startswith("/"):
            far = await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        else:
            far = await asyncio.open_connection(host, port)
        pair = {writer, far[1]}
        self._writers |= pair
        try:
            await asyncio.gather(_copy(reader, far[1]), _copy(far[0], writer))
        finally:
            self._writers -= pair
            for end in pair:
                end.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def link(database: PostgresSettings) -> AsyncIterator[Link]:
    link = Link(database)
    await link.mend()
    yield link
    await link.cut()


@pytest.fixture
async def pool(link: Link, clock: Clock) -> AsyncIterator[LazyPool]:
    pool = build_pool(link.settings, clock=clock)
    yield pool
    await pool.close()


@pytest.fixture
def store(pool: LazyPool) -> ApiKeyStore:
    return ApiKeyStore(pool)


@pytest.fixture
def verifier(store: ApiKeyStore, clock: Clock) -> ApiKeyVerifier:
    return ApiKeyVerifier(store, clock=clock)


async def create(store: ApiKeyStore, **changes: Any) -> tuple[str, Any]:
    return await store.create(**{"name": "ci", "owner": "ada", "created_by": "root"} | changes)


async def test_create_list_revoke(
    store: ApiKeyStore, verifier: ApiKeyVerifier, clock: Clock
) -> None:
    expires_at = utc_now() + timedelta(days=1)
    permissions = {Permission.USER, Permission.AUDITOR}
    plain, key = await create(
        store, models=["small"], permissions=permissions, expires_at=expires_at
    )
    await create(store, owner="bob")
    assert await store.list("ada") == [key]
    assert len(await store.list()) == 2
    assert plain not in repr(await store.list())
    assert (key.permissions, key.models, key.expires_at) == (permissions, {"small"}, expires_at)

    principal = await verifier.verify(plain)
    assert (principal.id, principal.api_key_id, principal.models) == ("ada", key.id, {"small"})

    assert await store.revoke(key.id)
    assert await store.revoke(key.id)
    assert not await store.revoke(new_id())
    clock.time += 1.01
    with pytest.raises(AuthenticationFailed):
        await verifier.verify(plain)


async def test_only_the_hash_is_stored(store: ApiKeyStore, pool: LazyPool) -> None:
    plain, _ = await create(store)
    async with pool.connection() as connection:
        row = await connection.fetchval("SELECT api_keys::text FROM comp_ai.api_keys")
    assert plain.rpartition("-")[2] not in row


async def test_expired_key_is_refused(store: ApiKeyStore, clock: Clock) -> None:
    expires_at = utc_now() + timedelta(seconds=60)
    plain, _ = await create(store, expires_at=expires_at)
    await ApiKeyVerifier(store, now=lambda: expires_at - timedelta(seconds=1)).verify(plain)
    with pytest.raises(AuthenticationFailed):
        await ApiKeyVerifier(store, now=lambda: expires_at).verify(plain)


async def test_link_is_cut_and_mended(
    link: Link, store: ApiKeyStore, verifier: ApiKeyVerifier, clock: Clock
) -> None:
    plain, key = await create(store)
    other, _ = await create(store)
    await verifier.verify(plain)
    await link.cut()
    clock.time += 10
    assert (await verifier.verify(plain)).api_key_id == key.id
    for unknown in (other, generate_key()[0]):
        with pytest.raises(IdentityUnavailable):
            await verifier.verify(unknown)
    clock.time += 300
    with pytest.raises(IdentityUnavailable):
        await verifier.verify(plain)
    await link.mend()
    clock.time += 10
    assert (await verifier.verify(plain)).api_key_id == key.id
    assert (await verifier.verify(other)).id == "ada"


async def test_starts_with_postgresql_away(
    link: Link, store: ApiKeyStore, verifier: ApiKeyVerifier, clock: Clock
) -> None:
    plain, _ = await create(store)
    await link.cut()
    fresh = build_pool(link.settings, clock=clock)
    starting = ApiKeyVerifier(ApiKeyStore(fresh), clock=clock)
    starting.start()
    with pytest.raises(IdentityUnavailable):
        await starting.verify(plain)
    await link.mend()
    clock.time += 10
    assert (await starting.verify(plain)).id == "ada"
    await starting.close()
    await fresh.close()


async def test_last_use_is_written_without_going_back(store: ApiKeyStore) -> None:
    (_, first), (_, second) = await create(store), await create(store)
    later = utc_now()
    earlier = later - timedelta(hours=1)
    await store.mark_used({first.id: later, second.id: earlier})
    await asyncio.gather(
        store.mark_used({first.id: earlier, second.id: later}),
        store.mark_used({second.id: earlier, first.id: earlier, new_id(): later}),
    )
    assert [key.last_used_at for key in await store.list()] == [later, later]


async def test_authenticator_from_settings(database: PostgresSettings, store: ApiKeyStore) -> None:
    plain, key = await create(store)
    settings = load_settings({}).model_copy(update={"postgres": database})
    authenticator = build_authenticator(settings)
    authenticator.start()
    principal = await authenticator.authenticate(f"Bearer {plain}")
    assert principal.api_key_id == key.id
    await authenticator.close()
    (written,) = await store.list()
    assert written.last_used_at is not None


async def test_lookup_uses_the_index(pool: LazyPool) -> None:
    async with pool.connection() as connection:
        await connection.execute("SET enable_seqscan = off")
        plan = await connection.fetch(f"EXPLAIN {FIND_KEYS}", ["a", "b"])
    assert any("api_keys_prefix_key" in row[0] for row in plan)


async def test_missing_table_is_an_outage_not_a_crash(
    store: ApiKeyStore, verifier: ApiKeyVerifier, pool: LazyPool
) -> None:
    plain, _ = await create(store)
    async with pool.connection() as connection:
        await connection.execute("ALTER TABLE comp_ai.api_keys RENAME TO gone")
    with pytest.raises(IdentityUnavailable) as refusal:
        await verifier.verify(plain)
    assert isinstance(refusal.value.__cause__, asyncpg.UndefinedTableError)


async def test_the_principal_of_a_key_can_be_recorded(
    store: ApiKeyStore, verifier: ApiKeyVerifier
) -> None:
    plain, key = await store.create(name="k", owner="ada", created_by="test")
    principal = await verifier.verify(plain)
    record = RequestRecord(
        id=new_id(),
        request_id="r",
        created_at=utc_now(),
        route="models",
        status=200,
        outcome=Outcome.COMPLETED,
        api_key_id=principal.api_key_id,
    )
    assert RequestRecord.from_json(record.to_json()).api_key_id == key.id
