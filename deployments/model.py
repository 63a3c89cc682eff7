"""A model: vLLM in a Serve replica, asked over HTTP under a lease that Ray hands out."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any, get_args

import prometheus_client
from ray.serve import Application
from ray.serve.llm import LLMConfig, build_llm_deployment
from ray.serve.llm.deployment import LLMServer

from deployments.leasing import Leasing, replica_id
from deployments.options import ModelArgs
from serve_app.config import parse_config
from serve_app.engine_counters import EngineCounters, read_engine_counters, read_progress
from serve_app.engine_watch import EngineStuck, EngineWatch
from serve_app.errors import ModelNotReady
from serve_app.models.weights import adapter_rank, find_adapter, find_weights
from serve_app.replica import Run
from serve_app.settings import TracingSettings, load_settings


def build(args: dict[str, Any]) -> Application:
    """Build the Serve application of one model from its `args` in the config YAML.

    Raises:
        ConfigError: for an unknown setting, a wrong value, or weights that are not there.
    """
    model = parse_config(ModelArgs, args, "args")
    return build_llm_deployment(
        llm_config(model),
        name_prefix="Model:",
        deployment_cls=Model,
        bind_kwargs={"stuck_after_s": model.stuck_after_s},
    )


def llm_config(model: ModelArgs) -> LLMConfig:
    """Return what Ray's LLMServer is to run. Raises ConfigError where weights are missing."""
    device: dict[str, Any] = (
        {"accelerator_config": {"kind": "cpu"}}
        if model.device == "cpu"
        else {"accelerator_type": model.accelerator_type}
    )
    settings = load_settings()
    models_path = settings.service.models_path
    weights = find_weights("args.weights", model.weights, models_path)
    return LLMConfig(
        model_loading_config={"model_id": model.name, "model_source": weights},
        engine_kwargs={
            **_adapter_arguments(model, models_path),
            **_tracing_arguments(settings.tracing),
            **model.engine,
        },
        deployment_config={"ray_actor_options": {"num_cpus": model.replica_cpus}},
        # vLLM then keeps its counters in this process's Prometheus registry, where the
        # accounts can read them exactly; Ray's copy of them is minutes of delay away.
        log_engine_metrics=False,
        **device,
    )


def leave_nodes_as_they_are(config: LLMConfig) -> None:
    """Have Ray start nothing that fetches weights before the engine starts.

    They are in a folder, or the engine fetches them itself. Ray would find that out in a process
    of its own on each node, which first imports all of vLLM: 15 s of a start on two cores.
    """
    config.get_or_create_callback().ctx.run_init_node = False


def _tracing_arguments(settings: TracingSettings) -> dict[str, Any]:
    """Return the engine argument by which vLLM makes a span of each request that is traced."""
    return {} if settings.url is None else {"otlp_traces_endpoint": settings.url}


def _tell_exporter_of_engine(settings: TracingSettings) -> None:
    # vLLM takes no argument for these, and its processes inherit the environment.
    if settings.url is not None:
        os.environ.setdefault("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
        os.environ.setdefault("OTEL_SERVICE_NAME", f"{settings.service}-engine")


def _adapter_arguments(model: ModelArgs, models_path: Path) -> dict[str, Any]:
    """Return the engine arguments by which vLLM loads the adapters when it starts."""
    modules, ranks = [], []
    for index, adapter in enumerate(model.adapters):
        setting = f"args.adapters.{index}.weights"
        path = find_adapter(setting, adapter.weights, models_path)
        modules.append({"name": adapter.name, "path": path})
        ranks.append(adapter_rank(setting, path) or 0)
    if not modules:
        return {}
    return {
        "enable_lora": True,
        "lora_modules": modules,
        "max_loras": len(modules),
        "max_lora_rank": _rank_of_engine(max(ranks)),
    }


def _rank_of_engine(rank: int) -> int:
    """Return the lowest rank that vLLM offers and that holds `rank`."""
    from vllm.config.lora import LoRAConfig, MaxLoRARanks

    if rank == 0:
        return int(LoRAConfig.max_lora_rank)
    offered = sorted(get_args(MaxLoRARanks))
    return int(next((r for r in offered if r >= rank), offered[-1]))


class Model(Leasing, LLMServer):
    """An LLMServer that hands out leases and serves vLLM's own ASGI app under them."""

    # Serve awaits a constructor that is a coroutine.
    async def __init__(  # type: ignore[misc]
        self, llm_config: LLMConfig, *, stuck_after_s: float
    ) -> None:
        self._watch = EngineWatch(stuck_after_s)
        _tell_exporter_of_engine(load_settings().tracing)
        leave_nodes_as_they_are(llm_config)
        await super().__init__(llm_config)

    async def start(self) -> None:
        """Start the engine, then the HTTP server in front of it."""
        await super().start()
        app = await self.__serve_build_asgi_app__()
        self._engine = app.state.engine_client
        await self.open_door(app, self._abort)

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
        await super().check_health()
        self.check_door()
        self._check_progress()

    async def __del__(self) -> None:
        """Called by Serve when the replica stops."""
        await self.close_door()
        await super().__del__()

    def check_admission(self) -> None:
        """Refuse leases when the engine is dead; Serve takes a while to replace the replica."""
        if self._engine.errored:
            raise ModelNotReady

    def _check_progress(self) -> None:
        unfinished = self._engine.output_processor.get_num_unfinished_requests()
        try:
            self._watch.look(unfinished, read_progress(prometheus_client.REGISTRY.collect()))
        except EngineStuck:
            # Now its requests fail at once: Serve would give them all the time of a graceful
            # stop. The processes of the engine are the only ones that are started here.
            for process in multiprocessing.active_children():
                process.kill()
            raise

    async def _abort(self, run: Run) -> None:
        await self._engine.abort(_running_for(run, self._engine.output_processor))


def _running_for(run: Run, outputs: Any) -> list[str]:
    """Return the ids that vLLM's endpoints gave to what they do for the request of `run`.

    They make them of its X-Request-ID, with a prefix by endpoint and mostly a suffix by prompt:
    see `request_id` in vllm/entrypoints.
    """
    if not run.request_id:
        return []
    return [name for name in outputs.external_req_ids if run.request_id in name]
