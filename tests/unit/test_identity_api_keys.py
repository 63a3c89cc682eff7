"""API keys: their form, and what the verifier asks of the table."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from serve_app.audit.act import Actor
from serve_app.config import LimitPolicy
from serve_app.errors import AuthenticationFailed, IdentityUnavailable, InvalidRequest
from serve_app.identity.api_key_verifier import ApiKeyVerifier
from serve_app.identity.api_keys import (
    ApiKey,
    ApiKeyStore,
    KeyTerms,
    generate_key,
    prefix_of,
)
from serve_app.identity.digest import digest_of
from serve_app.identity.key_changes import OnChange, Watch
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
        self.answering = asyncio.Event()
        self.answering.set()
        self.flushes = 0
        self.writing: asyncio.Event | None = None
        self.away = False

    def add(self, **changes: Any) -> str:
        plain, prefix, secret_hash = generate_key()
        key = ApiKey(
            id=uuid.uuid4(),
            prefix=prefix,
            secret_hash=secret_hash,
            owner="ada",
            terms=KeyTerms(name="test"),
            created_at=NOW,
            created_by="test",
            revoked_at=None,
            last_used_at=None,
        )
        self.keys[prefix] = _changed(key, **changes)
        return plain

    def change(self, plain: str, **changes: Any) -> None:
        prefix = prefix_of(plain)
        assert prefix is not None
        self.keys[prefix] = _changed(self.keys[prefix], **changes)

    async def find(self, prefixes: Collection[str]) -> dict[str, ApiKey]:
        self.queries.append(list(prefixes))
        read = {prefix: self.keys[prefix] for prefix in prefixes if prefix in self.keys}
        await asyncio.sleep(0)
        await self.answering.wait()
        if self.away:
            raise IdentityUnavailable
        return read

    async def mark_used(self, times: dict[uuid.UUID, datetime]) -> None:
        if self.away:
            raise IdentityUnavailable
        self.flushes += 1
        if self.writing is not None:
            await self.writing.wait()
        self.used |= times


def _changed(key: ApiKey, **changes: Any) -> ApiKey:
    names = {field.name for field in fields(KeyTerms)}
    terms = {name: changes.pop(name) for name in list(changes) if name in names}
    return replace(key, terms=replace(key.terms, **terms), **changes)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - of whatever state
            await asyncio.sleep(0)


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
    assert digest == digest_of(plain)
    assert len(digest) == 32
    assert generate_key()[0] != plain


def test_hash_is_not_shown(table: TableOfKeys) -> None:
    plain = table.add()
    assert str(digest_of(plain)) not in repr(table.keys)


async def test_key_names_its_owner(table: TableOfKeys, verifier: ApiKeyVerifier) -> None:
    plain = table.add(models=frozenset({"small"}))
    principal = await verifier.verify(plain)
    assert principal.id == "ada"
    assert principal.kind is PrincipalKind.API_KEY
    assert principal.api_key_id is not None
    assert principal.models == {"small"}


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


# Notices of changes.


class Notices:
    """Notices that a test gives."""

    def __init__(self) -> None:
        self.watch: Watch | None = None
        self.tell: OnChange = lambda _prefix: pytest.fail("not started")

    def start(self, on_change: OnChange) -> None:
        self.tell = on_change

    async def close(self) -> None:
        self.watch = None


@pytest.fixture
def notices() -> Notices:
    return Notices()


@pytest.fixture
async def listening(
    table: TableOfKeys, clock: Clock, notices: Notices
) -> AsyncIterator[ApiKeyVerifier]:
    verifier = ApiKeyVerifier(table, notices, clock=clock, now=lambda: NOW)
    verifier.start()
    notices.watch = Watch(clock())
    yield verifier
    await verifier.close()


async def test_table_is_not_asked_again_while_nothing_is_missed(
    table: TableOfKeys, listening: ApiKeyVerifier, clock: Clock, notices: Notices
) -> None:
    plain, unknown = table.add(), generate_key()[0]
    assert notices.watch is not None
    for _ in range(290):
        clock.time += 1
        notices.watch.confirmed_at = clock.time - 0.4
        await listening.verify(plain)
        with pytest.raises(AuthenticationFailed):
            await listening.verify(unknown)
    assert len(table.queries) == 2
    # Once in a while all the same: somebody may have dropped the trigger.
    clock.time += 20
    notices.watch.confirmed_at = clock.time
    await listening.verify(plain)
    assert len(table.queries) == 3


async def test_what_changed_is_forgotten_at_once(
    table: TableOfKeys, listening: ApiKeyVerifier, notices: Notices
) -> None:
    plain, other = table.add(), table.add()
    await listening.verify(plain)
    await listening.verify(other)
    table.change(plain, revoked_at=NOW)
    await listening.verify(plain)
    notices.tell(prefix_of(plain))
    with pytest.raises(AuthenticationFailed):
        await listening.verify(plain)
    await listening.verify(other)
    assert len(table.queries) == 3
    notices.tell(None)
    await listening.verify(other)
    assert len(table.queries) == 4


async def test_a_key_that_was_unknown_works_once_it_is_made(
    table: TableOfKeys, listening: ApiKeyVerifier, notices: Notices
) -> None:
    plain = table.add()
    made = table.keys.pop(str(prefix_of(plain)))
    with pytest.raises(AuthenticationFailed):
        await listening.verify(plain)
    table.keys[made.prefix] = made
    notices.tell(made.prefix)
    await listening.verify(plain)


@pytest.mark.parametrize("lost", [None, Watch(100.0)])
async def test_a_watch_that_was_lost_proves_nothing(
    table: TableOfKeys,
    listening: ApiKeyVerifier,
    clock: Clock,
    notices: Notices,
    lost: Watch | None,
) -> None:
    plain = table.add()
    await listening.verify(plain)
    table.change(plain, revoked_at=NOW)
    notices.watch = lost
    clock.time += 1.01
    if lost is not None:
        lost.confirmed_at = clock.time
    with pytest.raises(AuthenticationFailed):
        await listening.verify(plain)


async def test_a_change_while_the_table_is_asked_is_not_missed(
    table: TableOfKeys, listening: ApiKeyVerifier, clock: Clock, notices: Notices
) -> None:
    plain = table.add()
    table.answering.clear()
    asking = asyncio.create_task(listening.verify(plain))
    await until(lambda: bool(table.queries))
    # The row was read already, and the answer is still on its way.
    table.change(plain, revoked_at=NOW)
    notices.tell(prefix_of(plain))
    table.answering.set()
    await asking
    clock.time += 1.01
    assert notices.watch is not None
    notices.watch.confirmed_at = clock.time
    with pytest.raises(AuthenticationFailed):
        await listening.verify(plain)


async def test_stale_time_begins_when_the_watch_ends(
    table: TableOfKeys, listening: ApiKeyVerifier, clock: Clock, notices: Notices
) -> None:
    plain = table.add()
    await listening.verify(plain)
    clock.time += 250
    assert notices.watch is not None
    notices.watch.confirmed_at = clock.time
    notices.watch = None
    table.away = True
    clock.time += 299
    await listening.verify(plain)
    clock.time += 2
    with pytest.raises(IdentityUnavailable):
        await listening.verify(plain)


async def test_an_earlier_secret_is_the_key_itself(
    table: TableOfKeys, verifier: ApiKeyVerifier
) -> None:
    key_id = uuid.uuid4()
    plain = table.add(replaced_by=key_id, expires_at=NOW + timedelta(hours=1))
    assert (await verifier.verify(plain)).api_key_id == key_id
    await verifier.flush()
    # Its own use is noted, so that one sees who still has it.
    assert set(table.used) == {table.keys[str(prefix_of(plain))].id}


async def test_limits_of_a_key_are_those_of_its_principal(
    table: TableOfKeys, verifier: ApiKeyVerifier
) -> None:
    limits = LimitPolicy(requests_per_minute=3)
    assert (await verifier.verify(table.add(limits=limits))).limits == limits


async def test_a_flush_that_is_cut_short_loses_nothing(table: TableOfKeys, clock: Clock) -> None:
    verifier = ApiKeyVerifier(table, clock=clock, now=lambda: NOW, flush_s=0)
    principal = await verifier.verify(table.add())
    table.writing = asyncio.Event()
    verifier.start()
    await until(lambda: table.flushes > 0)
    closing = asyncio.create_task(verifier.close())
    await until(lambda: table.flushes > 1)
    table.writing.set()
    await closing
    assert table.used == {principal.api_key_id: NOW}


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""},
        {"owner": "a\x00b"},
        {"owner": "x" * 256},
        {"permissions": frozenset()},
        {"models": frozenset()},
        {"models": frozenset({"a\nb"})},
        {"note": "x" * 1001},
        {"expires_at": datetime(2020, 1, 1, tzinfo=UTC)},
        {"expires_at": datetime(2999, 1, 1)},
    ],
)
async def test_new_keys_are_checked(changes: dict[str, Any]) -> None:
    async def connect() -> Any:
        raise AssertionError("PostgreSQL was asked")

    store = ApiKeyStore(LazyPool(connect))
    owner = changes.pop("owner", "o")
    terms = KeyTerms(**{"name": "n"} | changes)
    with pytest.raises(InvalidRequest):
        await store.create(terms, owner=owner, by=Actor(id="root", kind="user"))


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
    # Half of each wait is left to chance: 0.5 to 1 s, then 1 to 2 s.
    for wait_s, expected in ((0.4, 1), (0.7, 2), (0.9, 2), (1.2, 3), (2.1, 4)):
        clock.time += wait_s
        await attempt()
        assert attempts == expected
