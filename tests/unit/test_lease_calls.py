"""Leases that are asked of Ray: whoever is cancelled at whatever moment, no slot stays held.

The calls are Ray's own; what a replica sends on them is played.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from ray import serve
from ray.serve._private.common import RequestMetadata
from ray.serve.handle import DeploymentResponseGenerator

from deployments.seams import models
from deployments.seams.models import RayModelPool
from serve_app.config import ModelEntry, Standing
from serve_app.contracts import Lease, LeaseGrant, LeaseHint

GRANT = LeaseGrant(address="127.0.0.1:1", token="t", replica_id="r")
MODEL = ModelEntry(name="small", app="small")
HINT = LeaseHint(request_id="", principal_id="", standing=Standing())


class Slot:
    """What Ray makes of a call once a replica has taken it."""

    def __init__(self) -> None:
        self.granted = asyncio.Event()
        # The replica was told that the lease is over, and ends the call.
        self.told = asyncio.Event()
        self.ended = asyncio.Event()
        # Whether it was cancelled while the replica still held it.
        self.cut = False
        self._grants = iter([GRANT])
        self._over = False

    async def __anext__(self) -> LeaseGrant:
        await self.granted.wait()
        for grant in self._grants:
            return grant
        await self.told.wait()
        self._over = True
        raise StopAsyncIteration

    def cancel(self) -> None:
        self.cut = self.cut or not self._over
        self.ended.set()


class Doors:
    """The doors of the replicas: told of an end, they end what `slot` is."""

    def __init__(self) -> None:
        self.slot: Slot | None = None
        self.agree = True
        self.told: list[LeaseGrant] = []

    async def end_lease(self, session: Any, grant: LeaseGrant) -> bool:
        self.told.append(grant)
        await asyncio.sleep(0)
        if self.agree and self.slot is not None:
            self.slot.told.set()
        return self.agree


class Application:
    """Stands for the handle of a model's application; keeps every call that was made."""

    deployment_name = "Model:small"

    def __init__(self) -> None:
        self.calls: asyncio.Queue[asyncio.Future[Slot]] = asyncio.Queue()
        self.lease = self

    def options(self, **_: Any) -> Application:
        return self

    def remote(self, _: LeaseHint) -> DeploymentResponseGenerator:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.calls.put_nowait(future)
        metadata = RequestMetadata(request_id="1", internal_request_id="1")
        return DeploymentResponseGenerator(
            future, metadata, _is_router_running_in_separate_loop=False
        )

    async def asked(self) -> asyncio.Future[Slot]:
        """Return the next call that is made."""
        return await asyncio.wait_for(self.calls.get(), 10)


class NothingDeployed:
    """What Serve says of its applications."""

    async def get(self) -> dict[str, Any]:
        return {}


@pytest.fixture
def application(monkeypatch: pytest.MonkeyPatch) -> Application:
    application = Application()
    monkeypatch.setattr(models, "ServedApplications", NothingDeployed)
    monkeypatch.setattr(serve, "get_app_handle", lambda _: application)
    return application


@pytest.fixture
def doors(monkeypatch: pytest.MonkeyPatch) -> Doors:
    doors = Doors()
    monkeypatch.setattr(models, "end_lease", doors.end_lease)
    return doors


@pytest.fixture
def pool(application: Application, doors: Doors) -> RayModelPool:
    session: Any = None
    return RayModelPool(session)


def given_out() -> Slot:
    slot = Slot()
    slot.granted.set()
    return slot


async def ended(slot: Slot) -> None:
    async with asyncio.timeout(10):
        await slot.ended.wait()


async def opened(pool: RayModelPool, application: Application, slot: Slot) -> Lease:
    opening = asyncio.create_task(pool.open(MODEL, HINT))
    (await application.asked()).set_result(slot)
    return await opening


async def test_lease_is_held_until_the_replica_is_told_of_its_end(
    application: Application, pool: RayModelPool, doors: Doors
) -> None:
    doors.slot = slot = given_out()
    lease = await opened(pool, application, slot)
    assert lease.grant is GRANT
    assert not slot.ended.is_set()
    lease.close()
    await ended(slot)
    assert doors.told == [GRANT]
    assert not slot.cut


async def test_call_at_a_replica_that_does_not_listen_is_cancelled(
    application: Application, pool: RayModelPool, doors: Doors
) -> None:
    slot = given_out()
    doors.agree = False
    (await opened(pool, application, slot)).close()
    await ended(slot)
    assert slot.cut


async def test_call_that_a_replica_does_not_end_is_cancelled(
    application: Application, pool: RayModelPool, doors: Doors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_ENDED_WITHIN_S", 0.01)
    slot = given_out()
    (await opened(pool, application, slot)).close()
    await ended(slot)
    assert doors.told == [GRANT]
    assert slot.cut


async def test_pool_is_closed_once_the_replicas_know(
    application: Application, pool: RayModelPool, doors: Doors
) -> None:
    doors.slot = slot = given_out()
    (await opened(pool, application, slot)).close()
    assert not slot.ended.is_set()
    await pool.close()
    assert slot.ended.is_set()


async def test_who_gives_up_before_a_replica_has_room_takes_the_call_back(
    application: Application, pool: RayModelPool
) -> None:
    opening = asyncio.create_task(pool.open(MODEL, HINT))
    taken = await application.asked()
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    await asyncio.wait([taken], timeout=10)
    assert taken.cancelled()


@pytest.fixture(params=[0.0, 10.0])
def granted_within_s(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How long a call that nobody wants any more may still be granted: not at all, or long."""
    monkeypatch.setattr(models, "_GRANTED_WITHIN_S", request.param)


@pytest.mark.usefixtures("granted_within_s")
async def test_slot_that_is_granted_as_its_waiter_gives_up_is_given_back(
    application: Application, pool: RayModelPool, doors: Doors
) -> None:
    opening = asyncio.create_task(pool.open(MODEL, HINT))
    taken = await application.asked()
    doors.slot = slot = given_out()
    taken.set_result(slot)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    await ended(slot)
    assert not slot.cut


@pytest.mark.usefixtures("granted_within_s")
async def test_slot_whose_grant_is_on_the_way_is_given_back(
    application: Application, pool: RayModelPool, doors: Doors
) -> None:
    opening = asyncio.create_task(pool.open(MODEL, HINT))
    doors.slot = slot = Slot()
    (await application.asked()).set_result(slot)
    for _ in range(5):
        await asyncio.sleep(0)
    opening.cancel()
    slot.granted.set()
    with pytest.raises(asyncio.CancelledError):
        await opening
    await ended(slot)
    assert not slot.cut


async def test_call_that_is_granted_soon_after_its_waiter_gave_up_ends_in_good_order(
    application: Application, pool: RayModelPool, doors: Doors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_GRANTED_WITHIN_S", 10.0)
    opening = asyncio.create_task(pool.open(MODEL, HINT))
    taken = await application.asked()
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    doors.slot = slot = given_out()
    taken.set_result(slot)
    await ended(slot)
    assert doors.told == [GRANT]
    assert not slot.cut


@pytest.mark.parametrize("granted", [False, True])
async def test_call_at_what_is_no_longer_deployed_begins_again(
    application: Application, pool: RayModelPool, granted: bool
) -> None:
    opening = asyncio.create_task(pool.open(MODEL, HINT))
    taken = await application.asked()
    old = given_out()
    if granted:
        taken.set_result(old)
    # It looks, and drops the way to what is gone.
    await pool.state(MODEL)
    new = given_out()
    (await application.asked()).set_result(new)
    lease = await opening
    if granted:
        await ended(old)
    assert not new.ended.is_set()
    lease.close()
    await ended(new)
