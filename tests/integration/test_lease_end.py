"""The word by which a gateway ends a lease, over HTTP, at a replica's real door."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import aiohttp
import pytest
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from serve_app.completions import upstream
from serve_app.completions.upstream import end_lease, new_session
from serve_app.contracts import LeaseGrant
from serve_app.fake_engine import FakeEngineConfig
from serve_app.replica import LEASE_HEADER, ReplicaServer
from tests.integration.fakes import HOST, FakeReplica, until

CHAT = "/v1/chat/completions"
ENDLESS = {
    "model": "small",
    "messages": [{"role": "user", "content": "one"}],
    "max_tokens": 100_000,
    "stream": True,
}


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with new_session() as session:
        yield session


@pytest.fixture
async def replica() -> AsyncIterator[FakeReplica]:
    replica = FakeReplica("r", FakeEngineConfig(), None)
    await replica.server.start()
    yield replica
    await replica.server.stop()


def grant_of(replica: FakeReplica, token: str) -> LeaseGrant:
    return LeaseGrant(address=replica.server.address, token=token, replica_id=replica.id)


async def test_replica_ends_the_lease_that_it_is_told_of(
    replica: FakeReplica, session: aiohttp.ClientSession
) -> None:
    async with replica.leases.lease() as other, replica.leases.lease() as slot:
        assert await end_lease(session, grant_of(replica, slot.token))
        assert slot.stopped.is_set()
        assert not other.stopped.is_set()


async def test_engine_stops_what_ran_under_it(
    replica: FakeReplica, session: aiohttp.ClientSession
) -> None:
    async with replica.leases.lease() as slot:
        grant = grant_of(replica, slot.token)
        url = f"http://{grant.address}{CHAT}"
        async with session.post(url, json=ENDLESS, headers={LEASE_HEADER: grant.token}) as answer:
            assert answer.status == 200
            await answer.content.readany()
            assert replica.counters.requests_running == 1
            assert await end_lease(session, grant)
            await until(lambda: replica.counters.requests_running == 0)


async def test_replica_says_no_to_a_lease_that_it_does_not_know(
    replica: FakeReplica, session: aiohttp.ClientSession
) -> None:
    async with replica.leases.lease() as slot:
        assert not await end_lease(session, grant_of(replica, "guessed"))
        assert not slot.stopped.is_set()


async def test_replica_that_is_gone_says_nothing(
    replica: FakeReplica, session: aiohttp.ClientSession
) -> None:
    grant = grant_of(replica, "any")
    await replica.server.stop()
    assert not await end_lease(session, grant)


async def test_replica_of_the_release_before_knows_no_such_word(
    replica: FakeReplica, session: aiohttp.ClientSession
) -> None:
    async def engine(scope: Scope, receive: Receive, send: Send) -> None:
        await JSONResponse({"detail": "Not Found"}, 404)(scope, receive, send)

    server = ReplicaServer(engine, HOST)
    await server.start()
    try:
        grant = replace(grant_of(replica, "any"), address=server.address)
        assert not await end_lease(session, grant)
    finally:
        await server.stop()


async def test_replica_that_stands_still_is_not_waited_for(
    session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream, "_END_TIMEOUT_S", 0.05)
    still = await asyncio.start_server(lambda *_: None, HOST, 0)
    async with still:
        host, port = still.sockets[0].getsockname()
        grant = LeaseGrant(address=f"{host}:{port}", token="t", replica_id="r")
        async with asyncio.timeout(10):
            assert not await end_lease(session, grant)
