"""API keys: their form, and what the verifier asks of the table."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Collection
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from serve_app.errors import AuthenticationFailed, IdentityUnavailable, InvalidRequest
from serve_app.identity.api_key_verifier import ApiKeyVerifier
from serve_app.identity.api_keys import ApiKey, ApiKeyStore, generate_key, hash_key, prefix_of
from serve_app.identity.principal import Permission
from serve_app.lazy_pool import LazyPool
from serve_app.records import PrincipalKind

BOOTSTRAP = "bootstrap-" + "x" * 32
NOW = datetime(2026, 1, 1, tzinfo=UTC)


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


class TableOfKeys(ApiKeyStore):
    """The table as plain objects; counts its queries and can be away."""

    def __init__(self) -> None:
        self.keys: dict[str, ApiKey] = {}
        self.queries: list[list[str]] = []
        self.used: dict[uuid.UUID, datetime] = {}
        self.away = False

    def add(self, **changes: Any) -> str:
        plain, prefix, secret_hash = generate_key()
        key = ApiKey(
            id=uuid.uuid4(),
            prefix=prefix,
            secret_hash=secret_hash,
            name="test",
            owner="ada",
            permissions=frozenset({Permission.USER}),
            models=None,
            created_at=NOW,
            created_by="test",
            expires_at=None,
            revoked_at=None,
            last_used_at=None,
        )
        self.keys[prefix] = replace(key, **changes)
        return plain

    def change(self, plain: str, **changes: Any) -> None:
        prefix = prefix_of(plain)
        assert prefix is not None
        self.keys[prefix] = replace(self.keys[prefix], **changes)

    async def find(self, prefixes: Collection[str]) -> dict[str, ApiKey]:
        self.queries.append(list(prefixes))
        await asyncio.sleep(0)
        if self.away:
            raise IdentityUnavailable
        return {prefix: self.keys[prefix] for prefix in prefixes if prefix in self.keys}

    async def mark_used(self, times: dict[uuid.UUID, datetime]) -> None:
        if self.away:
            raise IdentityUnavailable
        self.used |= times


@pytest.fixture
def table() -> TableOfKeys:
    return TableOfKeys()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def verifier(table: TableOfKeys, clock: Clock) -> ApiKeyVerifier:
    return ApiKeyVerifier(table, bootstrap_key=BOOTSTRAP, clock=clock, now=lambda: NOW)


def test_form_of_a_key() -> None:
    plain, prefix, digest = generate_key()
    assert plain.startswith(f"cai-{prefix}-")
    assert len(plain) == 4 + 12 + 1 + 43
    assert prefix_of(plain) == prefix
    assert digest == hash_key(plain)
    assert len(digest) == 32
    assert generate_key()[0] != plain


def test_hash_is_not_shown(table: TableOfKeys) -> None:
    plain = table.add()
    assert str(hash_key(plain)) not in repr(table.keys)


async def test_key_names_its_owner(table: TableOfKeys, verifier: ApiKeyVerifier) -> None:
    plain = table.add(models=frozenset({"small"}))
    principal = await verifier.verify(plain)
    assert principal.id == "ada"
    assert principal.kind is PrincipalKind.API_KEY
    assert principal.api_key_id is not None
    assert principal.may_use("small")
    assert not principal.may_use("large")


async def test_refusals_are_all_alike(table: TableOfKeys, verifier: ApiKeyVerifier) -> None:
    good = table.add()
    refused = [
        generate_key()[0],
        good[:-1] + ("A" if good[-1] != "A" else "B"),
        good[:-1],
        good + "\n",
        "cai-",
        "cai-' OR 1=1 --",
        table.add(expires_at=NOW),
        table.add(revoked_at=NOW - timedelta(days=1)),
    ]
    messages = set()
    for plain in refused:
        with pytest.raises(AuthenticationFailed) as refusal:
            await verifier.verify(plain)
        messages.add(refusal.value.message)
    assert len(messages) == 1
    await verifier.verify(good)


async def test_revocation_acts_within_a_second(
    table: TableOfKeys, verifier: ApiKeyVerifier, clock: Clock
) -> None:
    plain = table.add()
    await verifier.verify(plain)
    table.change(plain, revoked_at=NOW)
    clock.time += 1.01
    with pytest.raises(AuthenticationFailed):
        await verifier.verify(plain)


async def test_a_key_in_use_costs_one_query_a_second(
    table: TableOfKeys, verifier: ApiKeyVerifier, clock: Clock
) -> None:
    plain = table.add()
    for _ in range(3):
        await asyncio.gather(*(verifier.verify(plain) for _ in range(50)))
        clock.time += 1.01
    assert len(table.queries) == 3


async def test_flood_of_unknown_keys_is_asked_in_batches(
    table: TableOfKeys, verifier: ApiKeyVerifier
) -> None:
    flood = [generate_key()[0] for _ in range(1000)]
    answers = await asyncio.gather(
        *(verifier.verify(plain) for plain in flood * 2), return_exceptions=True
    )
    assert all(isinstance(answer, AuthenticationFailed) for answer in answers)
    assert len(table.queries) <= 4
    with pytest.raises(AuthenticationFailed):
        await verifier.verify(flood[0])
    assert len(table.queries) <= 4


async def test_known_keys_work_while_the_table_is_away(
    table: TableOfKeys, verifier: ApiKeyVerifier, clock: Clock
) -> None:
    plain, other = table.add(), table.add()
    await verifier.verify(plain)
    table.away = True
    clock.time += 299
    await verifier.verify(plain)
    with pytest.raises(IdentityUnavailable):
        await verifier.verify(other)
    assert (await verifier.verify(BOOTSTRAP)).permissions == {Permission.ADMIN}
    clock.time += 2
    with pytest.raises(IdentityUnavailable):
        await verifier.verify(plain)
    table.away = False
    await verifier.verify(plain)


async def test_revoked_key_stays_refused_while_the_table_is_away(
    table: TableOfKeys, verifier: ApiKeyVerifier, clock: Clock
) -> None:
    plain = table.add(revoked_at=NOW)
    with pytest.raises(AuthenticationFailed):
        await verifier.verify(plain)
    table.away = True
    clock.time += 60
    with pytest.raises(AuthenticationFailed):
        await verifier.verify(plain)


async def test_client_that_leaves_does_not_stop_the_others(
    table: TableOfKeys, verifier: ApiKeyVerifier
) -> None:
    plain = table.add()
    leaver, stayer = (asyncio.create_task(verifier.verify(plain)) for _ in range(2))
    await asyncio.sleep(0)
    leaver.cancel()
    assert (await stayer).id == "ada"


async def test_last_use_is_written_on_close_and_kept_while_away(
    table: TableOfKeys, verifier: ApiKeyVerifier
) -> None:
    verifier.start()
    plain = table.add()
    principal = await verifier.verify(plain)
    table.away = True
    await verifier.flush()
    table.away = False
    assert table.used == {}
    await verifier.close()
    assert table.used == {principal.api_key_id: NOW}


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""},
        {"owner": "a\x00b"},
        {"owner": "x" * 256},
        {"permissions": ()},
        {"expires_at": datetime(2020, 1, 1, tzinfo=UTC)},
        {"expires_at": datetime(2999, 1, 1)},
    ],
)
async def test_new_keys_are_checked(changes: dict[str, Any]) -> None:
    async def connect() -> Any:
        raise AssertionError("PostgreSQL was asked")

    store = ApiKeyStore(LazyPool(connect))
    with pytest.raises(InvalidRequest):
        await store.create(**{"name": "n", "owner": "o", "created_by": "c"} | changes)


async def test_pool_is_not_tried_again_at_once() -> None:
    attempts = 0

    async def connect() -> Any:
        nonlocal attempts
        attempts += 1
        raise ConnectionRefusedError

    clock = Clock()
    store = ApiKeyStore(
        LazyPool(connect, unavailable=IdentityUnavailable, retry_s=1, max_retry_s=2, clock=clock)
    )

    async def attempt() -> None:
        with pytest.raises(IdentityUnavailable):
            await store.list()

    await asyncio.gather(*(attempt() for _ in range(20)))
    assert attempts == 1
    for wait_s, expected in ((0.9, 1), (0.2, 2), (1.5, 2), (0.6, 3), (2.1, 4)):
        clock.time += wait_s
        await attempt()
        assert attempts == expected
