"""The half of a model deployment that does not depend on the engine: leases and HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator

from ray import serve
from starlette.types import ASGIApp

from deployments.counts_teller import CountsTeller
from deployments.direct import replica_address
from deployments.tracing import replica_sink
from serve_app.contracts import LeaseGrant, LeaseHint
from serve_app.engine_counters import EngineCounters
from serve_app.replica import Abort, LeaseBook, LeaseDoor, ReplicaServer, may_keep
from serve_app.scaling.readings import FirstTokens, LoadReadings
from serve_app.settings import load_settings
from serve_app.tracing.replica import TracedApp
from serve_app.tracing.spans import SpanSink


class Leasing:
    """Mixin of a deployment class that serves an ASGI app under leases."""

    _teller: CountsTeller | None = None
    _spans: SpanSink | None = None

    async def open_door(self, app: ASGIApp, abort: Abort) -> None:
        """Serve `app` behind a lease door on this node. Raises OSError if it cannot bind."""
        self._leases = LeaseBook()
        first_tokens = FirstTokens()
        self._load = LoadReadings(first_tokens)
        settings = load_settings()
        self._spans = replica_sink(settings.tracing, "model")
        door = LeaseDoor(self._traced(app), self._leases, abort, first_tokens)
        self._http = ReplicaServer(door, *replica_address(settings.service))
        await self._http.start()
        self._teller = CountsTeller(model_name(), self.engine_counters)
        self._teller.start()

    async def close_door(self) -> None:
        """Tell the last counts; what still runs is Serve's to wait for."""
        # There is none where the start failed.
        if self._teller is not None:
            await self._teller.close()
        if self._spans is not None:
            await self._spans.close()

    def _traced(self, app: ASGIApp) -> ASGIApp:
        if self._spans is None:
            return app
        said = {"comp_ai.replica_id": replica_id(), "comp_ai.model": model_name()}
        return TracedApp(app, self._spans, said)

    async def engine_counters(self) -> EngineCounters:
        """Return what the engine of this replica counted since it started."""
        raise NotImplementedError

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve every few seconds: return what `deployments.scaling` decides by."""
        return self._load.read(await self.engine_counters())

    async def lease(self, _hint: LeaseHint) -> AsyncIterator[LeaseGrant]:
        """Yield a grant once, then hold it until its door is told of its end.

        Or until Ray cancels this call, for a gateway that is gone, or does not reach the door.

        Raises:
            ModelNotReady: see `check_admission`.
        """
        self.check_admission()
        kept = may_keep(slots())
        async with self._leases.lease(kept=kept > 0) as slot:
            yield LeaseGrant(
                address=self._http.address,
                token=slot.token,
                replica_id=replica_id(),
                may_keep=kept,
            )
            await slot.stopped.wait()

    def check_admission(self) -> None:
        """Raise ModelNotReady if no lease is to be had here."""

    def check_door(self) -> None:
        """Raise RuntimeError if the HTTP server has stopped."""
        self._http.check()

    @property
    def live_leases(self) -> int:
        """Leases that are held now."""
        return len(self._leases)

    @property
    def resting_leases(self) -> int:
        """Of those, how many are kept for a next request while none runs under them."""
        return self._leases.resting


def model_name() -> str:
    """Return the name of the model that this replica is of."""
    return str(serve.get_replica_context().deployment).removeprefix("Model:")


def replica_id() -> str:
    """Return the id that Serve gave to this replica."""
    return str(serve.get_replica_context().replica_id.unique_id)


def slots() -> int:
    """Return how many leases Serve lets this replica hold now; 0 where Ray does not say."""
    # Ray's own `serve.batch` reads it there; nothing public says what the Serve config made of it.
    config = getattr(serve.get_replica_context(), "_deployment_config", None)
    return int(getattr(config, "max_ongoing_requests", 0))
