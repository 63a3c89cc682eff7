"""The fake engine behind the same leases as a model. No shipped config uses it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve import Application

from deployments.leasing import Leasing, replica_id
from serve_app.config import Name, parse_config
from serve_app.engine_counters import EngineCounters
from serve_app.fake_engine import FakeEngine, FakeEngineConfig
from serve_app.replica import Run


class FakeModelArgs(BaseModel):
    """`args` of a fake model's Serve application."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    speed: FakeEngineConfig = FakeEngineConfig()


def build(args: dict[str, Any]) -> Application:
    """Build the Serve application of a fake model. Raises ConfigError for wrong `args`."""
    model = parse_config(FakeModelArgs, args, "args")
    options = {"name": f"Model:{model.name}", "ray_actor_options": {"num_cpus": 0.1}}
    return serve.deployment(**options)(FakeModel).bind(model.speed)


class FakeModel(Leasing):
    """Hands out leases like a model."""

    # Serve awaits a constructor that is a coroutine.
    async def __init__(self, speed: FakeEngineConfig) -> None:  # type: ignore[misc]
        self._engine = FakeEngine(speed)
        await self.open_door(self._engine.app(), self._abort)

    async def engine_counters(self) -> EngineCounters:
        """Return what the fake engine counted since it started."""
        return self._engine.counters(
            replica_id=replica_id(),
            live_leases=self.live_leases,
            resting_leases=self.resting_leases,
        )

    async def check_health(self) -> None:
        """Fail if the HTTP server is dead, so that Serve replaces the replica."""
        self.check_door()

    async def __del__(self) -> None:
        """Called by Serve when the replica stops."""
        await self.close_door()

    async def _abort(self, run: Run) -> None:
        self._engine.abort(run.request_id)
