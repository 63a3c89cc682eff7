"""Gateways that only carry an answer, each by another way to the replica: Serve applications.

They sign nobody in, count nothing and keep no records, so what differs is the way. The replica is
the fake engine's, the same for all.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from deployments.fake_model import FakeModel
from deployments.seams.models import RayModelPool
from serve_app.completions.upstream import new_session
from serve_app.config import ModelEntry, QueueConfig, Standing
from serve_app.contracts import LeaseGrant, LeaseHint
from serve_app.fake_engine import FakeEngineConfig
from serve_app.metrics import NoMetrics
from serve_app.queueing.pool import QueuedPool
from serve_app.queueing.ticket import Ticket
from serve_app.replica import LEASE_HEADER, REQUEST_ID_HEADER
from tests.serve_configs import FAKE_MODEL

_PATH = "/v1/chat/completions"
_SLOTS = 5000
_WAIT_S = 60.0


class CarriedModel(FakeModel):
    """The fake model, which also answers through Ray."""

    async def chunks(self, payload: bytes) -> AsyncIterator[bytes]:
        """Yield the answer to a chat completion part by part, or at once where it is whole."""
        answer = await self._engine.chat(uuid.uuid4().hex, orjson.loads(payload))
        if isinstance(answer, StreamingResponse):
            async for chunk in answer.body_iterator:
                yield bytes(chunk)
        else:
            yield bytes(answer.body)


class _Carrier:
    """Answers a chat completion with what `_carried` yields."""

    title = ""

    def __serve_build_asgi_app__(self) -> Starlette:
        """Return the HTTP app; Serve calls this after the constructor."""
        return Starlette(routes=[Route(_PATH, self._chat, methods=["POST"])])

    async def _chat(self, request: Request) -> Response:
        payload = await request.body()
        if orjson.loads(payload)["stream"]:
            return StreamingResponse(self._carried(payload), media_type="text/event-stream")
        whole = b"".join([chunk async for chunk in self._carried(payload)])
        return Response(whole, media_type="application/json")

    def _carried(self, payload: bytes) -> AsyncIterator[bytes]:
        raise NotImplementedError


class ThroughRay(_Carrier):
    """Each part of an answer is an object that comes through Ray: the plain handle path."""

    title = "chunks through Ray"

    def __init__(self) -> None:
        self._handle: DeploymentHandle | None = None

    async def _carried(self, payload: bytes) -> AsyncIterator[bytes]:
        if self._handle is None:
            # It asks the controller and blocks for the answer.
            handle = await asyncio.to_thread(serve.get_app_handle, FAKE_MODEL)
            self._handle = handle.options(stream=True)
        call = self._handle.chunks.remote(payload)
        try:
            async for chunk in call:
                yield chunk
        finally:
            call.cancel()


class LeasedEach(_Carrier):
    """Ray grants a lease for each request; the answer comes over HTTP."""

    title = "a lease a request"

    async def __init__(self) -> None:  # type: ignore[misc]
        self._session = new_session()
        self._pool = RayModelPool(self._session)
        self._model = ModelEntry(name=FAKE_MODEL, app=FAKE_MODEL)

    async def _carried(self, payload: bytes) -> AsyncIterator[bytes]:
        async with self._granted() as grant:
            headers = {
                "content-type": "application/json",
                LEASE_HEADER: grant.token,
                REQUEST_ID_HEADER: uuid.uuid4().hex,
            }
            url = f"http://{grant.address}{_PATH}"
            async with self._session.post(url, data=payload, headers=headers) as response:
                response.raise_for_status()
                async for chunk in response.content.iter_any():
                    yield chunk

    @asynccontextmanager
    async def _granted(self) -> AsyncIterator[LeaseGrant]:
        lease = await self._pool.open(self._model, _hint())
        try:
            yield lease.grant
        finally:
            lease.close()


class LeasesKept(LeasedEach):
    """As the gateway does it: a lease serves one request after the other."""

    title = "kept leases"

    async def __init__(self) -> None:  # type: ignore[misc]
        await super().__init__()
        self._line = QueuedPool(self._pool, NoMetrics())

    @asynccontextmanager
    async def _granted(self) -> AsyncIterator[LeaseGrant]:
        ticket = Ticket(model=self._model, hint=_hint(), queue=QueueConfig(), timeout_s=_WAIT_S)
        lease = await self._line.open(ticket)
        try:
            yield lease.grant
        except BaseException:
            lease.close()
            raise
        lease.give_back()


def _hint() -> LeaseHint:
    return LeaseHint(request_id="", principal_id="", standing=Standing())


WAYS: dict[str, type[_Carrier]] = {
    "through-ray": ThroughRay,
    "leased-each": LeasedEach,
    "leases-kept": LeasesKept,
}


def carrier(args: dict[str, str]) -> Application:
    """Build the gateway of one way; `args` names it."""
    return _deployed(serve.ingress()(WAYS[args["way"]]), args["way"])


def model(args: dict[str, Any]) -> Application:
    """Build the model; `args` is the speed of its engine."""
    return _deployed(CarriedModel, f"Model:{FAKE_MODEL}", FakeEngineConfig(**args))


def _deployed(what: type[Any], name: str, *args: object) -> Application:
    options: dict[str, Any] = {"name": name, "max_ongoing_requests": _SLOTS}
    options |= {"ray_actor_options": {"num_cpus": 0.1}}
    return serve.deployment(**options)(what).bind(*args)


def applications(speed: dict[str, float]) -> list[dict[str, Any]]:
    """Return what a Serve config has of them: a model, and a gateway for each way."""
    found: list[dict[str, Any]] = [
        {
            "name": FAKE_MODEL,
            "route_prefix": None,
            "import_path": f"{__name__}:model",
            "args": speed,
        }
    ]
    for way in WAYS:
        found.append(
            {
                "name": way,
                "route_prefix": f"/{way}",
                "import_path": f"{__name__}:carrier",
                "args": {"way": way},
            }
        )
    return found
