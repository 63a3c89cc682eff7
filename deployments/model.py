"""A model: vLLM in a Serve replica, asked over HTTP under a lease that Ray hands out.

Serve imports this module wherever it builds the application, so it imports no engine: a replica
does that when it starts (`deployments.engine`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import prometheus_client
from ray import serve
from ray.serve import Application
from ray.util.accelerators import accelerators

from deployments.leasing import Leasing, replica_id
from deployments.model_files import find_files
from deployments.options import ModelArgs
from serve_app.config import parse_config
from serve_app.engine_counters import EngineCounters, read_engine_counters, read_progress
from serve_app.engine_watch import EngineStuck, EngineWatch
from serve_app.errors import ConfigError, ModelNotReady
from serve_app.replica import Run
from serve_app.settings import load_settings

if TYPE_CHECKING:
    from deployments.engine import Engine

# Where a Serve config sets none: what is too much waits in the engine.
_NO_BOUND = 1_000_000_000
# The sizes by which an engine takes several devices.
_SIZES = ("tensor_parallel_size", "pipeline_parallel_size")


def build(args: dict[str, Any]) -> Application:
    """Build the Serve application of one model from its `args` in the config YAML.

    Raises:
        ConfigError: for an unknown setting, a wrong value, or weights that are not there. What
            only vLLM knows of its arguments is left to `check` and to the start of a replica.
    """
    model = parse_config(ModelArgs, args, "args")
    find_files(model, load_settings().service.models_path)
    deployed = serve.deployment(
        name=deployment_name(model.name),
        max_ongoing_requests=_NO_BOUND,
        health_check_period_s=10,
        health_check_timeout_s=10,
        ray_actor_options={"num_cpus": model.replica_cpus},
        placement_group_bundles=placement(model),
        placement_group_strategy="PACK",
    )
    return deployed(Model).bind(model)


def check(args: dict[str, Any]) -> None:
    """Check what `build` leaves out, which takes seconds: whether vLLM has the arguments.

    Raises:
        ConfigError: names the setting, the value and what is allowed.
    """
    from deployments.engine import checked_config

    checked_config(parse_config(ModelArgs, args, "args"))


def deployment_name(model_name: str) -> str:
    """Return the name of a model's deployment, by which a Serve config sets its options."""
    return "Model:" + model_name.replace("/", "--").replace(".", "_")


def placement(model: ModelArgs) -> list[dict[str, float]]:
    """Return the bundles of Ray's resources for one replica: a device each.

    The replica's own process is in the first one. So Ray's LLM library has it, whose engine looks
    for its devices in them.

    Raises:
        ConfigError: Ray knows no such accelerator, or a size is no number of devices.
    """
    device = {"CPU": 1.0} if model.device == "cpu" else {"GPU": 1.0, **_accelerator(model)}
    tensor, pipeline = (_size(model, name) for name in _SIZES)
    bundles = [dict(device) for _ in range(tensor * pipeline)]
    bundles[0]["CPU"] = bundles[0].get("CPU", 0.0) + model.replica_cpus
    return bundles


def _accelerator(model: ModelArgs) -> dict[str, float]:
    if model.accelerator_type is None:
        return {}
    known = {value for name, value in vars(accelerators).items() if name.isupper()}
    if model.accelerator_type not in known:
        allowed = f"one that Ray knows: {', '.join(sorted(known))}"
        raise ConfigError("args.accelerator_type", model.accelerator_type, allowed)
    # A trace of the resource that Ray gives to nodes with such a device.
    return {f"accelerator_type:{model.accelerator_type}": 0.001}


def _size(model: ModelArgs, name: str) -> int:
    size = model.engine.get(name, 1)
    if not isinstance(size, int) or size < 1:
        raise ConfigError(f"args.engine.{name}", size, "a whole number of devices from 1")
    return size


class Model(Leasing):
    """Hands out leases of the engine that it starts."""

    # Serve awaits a constructor that is a coroutine.
    async def __init__(self, model: ModelArgs) -> None:  # type: ignore[misc]
        from deployments.engine import Engine

        self._watch = EngineWatch(model.stuck_after_s)
        self._engine: Engine | None = None
        self._engine = await Engine.started(model)
        await self.open_door(self._engine.app, self._abort)

    async def engine_counters(self) -> EngineCounters:
        """Return what vLLM counted in this replica since it started."""
        return read_engine_counters(
            prometheus_client.REGISTRY.collect(),
            replica_id=replica_id(),
            live_leases=self.live_leases,
            resting_leases=self.resting_leases,
        )

    async def check_health(self) -> None:
        """Fail if engine or HTTP server are dead or stuck, so that Serve replaces the replica."""
        await self._running.check_health()
        self.check_door()
        self._check_progress()

    async def __del__(self) -> None:
        """Called by Serve when the replica stops, also where it never started."""
        await self.close_door()
        if self._engine is not None:
            await self._engine.stop()

    def check_admission(self) -> None:
        """Refuse leases when the engine is dead; Serve takes a while to replace the replica."""
        if self._running.errored:
            raise ModelNotReady

    @property
    def _running(self) -> Engine:
        assert self._engine is not None
        return self._engine

    def _check_progress(self) -> None:
        progress = read_progress(prometheus_client.REGISTRY.collect())
        try:
            self._watch.look(self._running.unfinished, progress)
        except EngineStuck:
            # Serve would give its requests all the time of a graceful stop.
            self._running.kill()
            raise

    async def _abort(self, run: Run) -> None:
        await self._running.abort(run)
