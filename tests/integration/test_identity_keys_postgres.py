"""API keys in a real PostgreSQL whose link can be cut."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import asyncpg
import pytest

from serve_app.audit.act import Actor
from serve_app.errors import AuthenticationFailed, IdentityUnavailable, NotFound
from serve_app.identity.api_key_verifier import ApiKeyVerifier
from serve_app.identity.api_keys import ApiKeyStore, KeyTerms, generate_key, query
from serve_app.identity.authenticator import build_authenticator, build_pool
from serve_app.identity.principal import Permission
from serve_app.lazy_pool import LazyPool
from serve_app.records import Outcome, RequestRecord, new_id, utc_now
from serve_app.settings import PostgresSettings, load_settings
from tests.integration.links import Link

ROOT = Actor(id="root", kind="operator")


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


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
    owner = changes.pop("owner", "ada")
    return await store.create(KeyTerms(**{"name": "ci"} | changes), owner=owner, by=ROOT)


async def test_create_list_revoke(
    store: ApiKeyStore, verifier: ApiKeyVerifier, clock: Clock
) -> None:
    expires_at = utc_now() + timedelta(days=1)
    permissions = frozenset({Permission.USER, Permission.AUDITOR})
    plain, key = await create(
        store, models=frozenset({"small"}), permissions=permissions, expires_at=expires_at
    )
    await create(store, owner="bob")
    assert await store.list("ada") == [key]
    assert len(await store.list()) == 2
    assert plain not in repr(await store.list())
    assert key.terms == KeyTerms(
        name="ci", models=frozenset({"small"}), permissions=permissions, expires_at=expires_at
    )

    principal = await verifier.verify(plain)
    assert (principal.id, principal.api_key_id, principal.models) == ("ada", key.id, {"small"})

    revoked = await store.revoke(key.id, by=ROOT)
    assert await store.revoke(key.id, by=ROOT) == revoked
    with pytest.raises(NotFound):
        await store.revoke(new_id(), by=ROOT)
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
        plan = await connection.fetch(f"EXPLAIN {query('find')}", ["a", "b"])
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
    plain, key = await create(store)
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
