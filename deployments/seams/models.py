"""Leases, opened at the models' applications."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from deployments.applications import ServedApplications, StatusUnknown, state_of
from deployments.seams.calls import until_answered
from serve_app.config import ModelEntry
from serve_app.contracts import Lease, LeaseGrant, LeaseHint, ModelState
from serve_app.errors import ModelNotReady, ModelOverloaded


class RayLease:
    """A lease held open by a streaming handle call."""

    def __init__(self, grant: LeaseGrant, call: DeploymentResponseGenerator) -> None:
        self._grant = grant
        self._call = call

    @property
    def grant(self) -> LeaseGrant:
        """Where and with what to ask."""
        return self._grant

    def close(self) -> None:
        """See `Lease.close`."""
        self._call.cancel()


@dataclass(eq=False, slots=True)
class _Handle:
    """The way to one application, and the calls that wait on it for a slot."""

    handle: DeploymentHandle
    waiting: set[DeploymentResponseGenerator] = field(default_factory=set)


class RayModelPool:
    """Opens leases at the models' Serve applications.

    Applications may be removed, added and changed meanwhile. A handle stays good as long as
    its deployment has its name; `state` looks, and drops a handle that leads nowhere.
    """

    def __init__(self) -> None:
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

    async def _lease(self, model: ModelEntry, hint: LeaseHint) -> RayLease:
        known = await self._handle(model)
        try:
            return await _granted(known, hint)
        except DeploymentUnavailableError:
            # Taken away or failed, or deployed again since, which an old handle does not see.
            if await self.state(model) in (ModelState.FAILED, ModelState.ABSENT):
                raise ModelNotReady(f"`{model.name}` does not run now.") from None
            self._forget(model.app, known)
        try:
            return await _granted(await self._handle(model), hint)
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
            self._handles.setdefault(model.app, _Handle(handle.options(stream=True)))
        return self._handles[model.app]

    def _forget(self, app: str, known: _Handle) -> None:
        if self._handles.get(app) is known:
            del self._handles[app]
        # Their calls begin again, with the handle of what is deployed by then.
        for call in list(known.waiting):
            call.cancel()


async def _granted(known: _Handle, hint: LeaseHint) -> RayLease:
    call = known.handle.lease.remote(hint)
    known.waiting.add(call)
    try:
        return RayLease(await anext(call), call)
    except BaseException:
        # Also when cancelled: a slot that was granted meanwhile is given back.
        call.cancel()
        raise
    finally:
        known.waiting.discard(call)
