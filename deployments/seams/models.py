"""Leases, opened at the models' applications."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from ray import serve
from ray.serve.exceptions import (
    DeploymentUnavailableError,
    RayServeException,
    RequestCancelledError,
)
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from deployments.applications import ServedApplications, StatusUnknown, state_of
from deployments.seams.calls import answers, until_answered
from serve_app.background import stop_tasks
from serve_app.completions.upstream import end_lease
from serve_app.config import ModelEntry
from serve_app.contracts import Lease, LeaseGrant, LeaseHint, ModelState
from serve_app.errors import ModelNotReady, ModelOverloaded

# Between a replica that has ended a lease and the end of its call lies nothing but Serve.
_ENDED_WITHIN_S = 1.0
# Where a replica has room, a slot is granted in milliseconds.
_GRANTED_WITHIN_S = 0.1


class _Endings:
    """Ends the calls that hold leases: by a word to the replica, whose end of the call is then one
    like any other.

    Cancelling a call makes Serve answer it once more all the same, which gRPC refuses, and of each
    such refusal 275 bytes stay in the replica for good (load_tests/NOTES.md). So that is for
    replicas that do not listen.
    """

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self._under_way: set[asyncio.Task[None]] = set()

    def end(self, grant: LeaseGrant, call: DeploymentResponseGenerator) -> None:
        """End what was granted on `call`. Never waits."""
        self._spawn(self._end(grant, call))

    def take_back(
        self, call: DeploymentResponseGenerator, granted: asyncio.Task[LeaseGrant]
    ) -> None:
        """End `call`, which `granted` waits on for nobody any more. Never waits."""
        self._spawn(self._take_back(call, granted))

    async def close(self) -> None:
        """Wait until all have ended: each within seconds."""
        while self._under_way:
            await asyncio.wait(self._under_way)

    def _spawn(self, ending: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(ending, name="end-lease-call")
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def _end(self, grant: LeaseGrant, call: DeploymentResponseGenerator) -> None:
        try:
            if await end_lease(self._session, grant):
                await answers(_rest_of, call, timeout_s=_ENDED_WITHIN_S)
        finally:
            # Of a call that has ended it changes nothing.
            call.cancel()

    async def _take_back(
        self, call: DeploymentResponseGenerator, granted: asyncio.Task[LeaseGrant]
    ) -> None:
        """Take `call` back, and what it is granted.

        Most that are wanted no more are just being answered, and so end in good order.

        A call that was answered in the moment in which `granted` is cancelled has not taken the
        answer yet. Its `cancel` would do nothing then, once and for all, and the replica hold the
        slot for ever (read in Ray 2.60, with the router in the caller's loop). So another waits
        for it first. The first to do so may end the same way, but then the answer is there, and
        the second takes it without a wait.
        """
        await asyncio.wait([granted], timeout=_GRANTED_WITHIN_S)
        await stop_tasks(granted)
        for _ in range(2):
            if _has_result(granted):
                break
            granted = asyncio.create_task(call.__anext__(), name="take-lease")
            await asyncio.sleep(0)  # until it waits: cancelled before, it would not touch the call
            await stop_tasks(granted)
        if _has_result(granted):
            await self._end(granted.result(), call)
        else:
            call.cancel()


def _has_result(task: asyncio.Task[Any]) -> bool:
    return not task.cancelled() and task.exception() is None


async def _rest_of(call: DeploymentResponseGenerator) -> None:
    async for _ in call:
        pass


class RayLease:
    """A lease held open by a streaming handle call."""

    def __init__(
        self, grant: LeaseGrant, call: DeploymentResponseGenerator, endings: _Endings
    ) -> None:
        self._grant = grant
        self._call = call
        self._endings = endings

    @property
    def grant(self) -> LeaseGrant:
        """Where and with what to ask."""
        return self._grant

    def close(self) -> None:
        """See `Lease.close`."""
        self._endings.end(self._grant, self._call)


@dataclass(eq=False, slots=True)
class _Handle:
    """The way to one application, and the calls that wait on it for a slot."""

    handle: DeploymentHandle
    endings: _Endings
    waiting: set[asyncio.Task[LeaseGrant]] = field(default_factory=set)

    async def lease(self, hint: LeaseHint) -> RayLease:
        """Wait for a slot. If cancelled at any moment, none stays held."""
        call = self.handle.lease.remote(hint)
        granted = asyncio.create_task(call.__anext__(), name="wait-for-slot")
        self.waiting.add(granted)
        try:
            return RayLease(await asyncio.shield(granted), call, self.endings)
        except asyncio.CancelledError:
            self.endings.take_back(call, granted)
            if (task := asyncio.current_task()) is not None and not task.cancelling():
                # `forget` did it, not our caller.
                raise RequestCancelledError(call.request_id) from None
            raise
        except BaseException:
            call.cancel()
            raise
        finally:
            self.waiting.discard(granted)

    def forget(self) -> None:
        """Have the calls that wait begin again, at what is deployed by then."""
        for granted in list(self.waiting):
            granted.cancel()


class RayModelPool:
    """Opens leases at the models' Serve applications.

    Applications may be removed, added and changed meanwhile. A handle stays good as long as
    its deployment has its name; `state` looks, and drops a handle that leads nowhere.

    Args:
        session: to the replicas; its owner closes it, after this.
    """

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._endings = _Endings(session)
        self._handles: dict[str, _Handle] = {}
        self._applications = ServedApplications()

    async def open(self, model: ModelEntry, hint: LeaseHint) -> Lease:
        """See `ModelPool.open`."""

        async def lease() -> RayLease:
            return await self._lease(model, hint)

        return await until_answered(lease, ModelNotReady, ModelOverloaded)

    async def state(self, model: ModelEntry) -> ModelState:
        """See `ModelPool.state`."""
        try:
            app = (await self._applications.get()).get(model.app)
        except StatusUnknown:
            return ModelState.UNKNOWN
        deployments = app.deployments if app is not None else {}
        known = self._handles.get(model.app)
        if known is not None and known.handle.deployment_name not in deployments:
            self._forget(model.app, known)
        return state_of(app)

    async def close(self) -> None:
        """See `ModelPool.close`."""
        await self._endings.close()

    async def _lease(self, model: ModelEntry, hint: LeaseHint) -> RayLease:
        known = await self._handle(model)
        try:
            return await known.lease(hint)
        except DeploymentUnavailableError:
            # Taken away or failed, or deployed again since, which an old handle does not see.
            if await self.state(model) in (ModelState.FAILED, ModelState.ABSENT):
                raise ModelNotReady(f"`{model.name}` does not run now.") from None
            self._forget(model.app, known)
        try:
            return await (await self._handle(model)).lease(hint)
        except DeploymentUnavailableError as error:
            raise ModelNotReady(f"`{model.name}` does not run now.") from error

    async def _handle(self, model: ModelEntry) -> _Handle:
        if model.app not in self._handles:
            try:
                # It asks the controller and blocks for the answer.
                handle = await asyncio.to_thread(serve.get_app_handle, model.app)
            except RayServeException as error:
                if await self.state(model) in (ModelState.FAILED, ModelState.ABSENT):
                    raise ModelNotReady(f"`{model.name}` is not deployed now.") from error
                # It is being built, and Serve does not say yet what it will be called.
                raise
            # Another request may have been as fast.
            self._handles.setdefault(model.app, _Handle(handle.options(stream=True), self._endings))
        return self._handles[model.app]

    def _forget(self, app: str, known: _Handle) -> None:
        if self._handles.get(app) is known:
            del self._handles[app]
        known.forget()
