"""vLLM, as Ray's LLMServer starts it.

Importing this imports vLLM, which takes a core for ten seconds and more. So only the replica of a
model does, and the check of a config.
"""

from __future__ import annotations

import multiprocessing
import os
from typing import Any, get_args

from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer
from starlette.types import ASGIApp

from deployments.model_files import ModelFiles, find_files
from deployments.options import ModelArgs
from serve_app.errors import ConfigError
from serve_app.replica import Run
from serve_app.settings import TracingSettings, load_settings


def checked_config(model: ModelArgs) -> LLMConfig:
    """Return what Ray's LLMServer is to run, with arguments that vLLM has.

    Raises:
        ConfigError: vLLM does not know one of them, or files are missing.
    """
    config = llm_config(model)
    try:
        config.get_engine_config()
    except ValueError as error:
        raise ConfigError("args.engine", sorted(model.engine), str(error)) from None
    return config


class Engine:
    """One engine: its HTTP app, and its processes beside the replica's."""

    def __init__(self, server: _Server, app: Any) -> None:
        self._server = server
        self._client = app.state.engine_client
        self.app: ASGIApp = app

    @classmethod
    async def started(cls, model: ModelArgs) -> Engine:
        """Start the engine of `model` and return it once it serves.

        Raises:
            ConfigError: vLLM does not know an argument, or files are missing.
            Exception: whatever the engine fails of.
        """
        config = checked_config(model)
        _tell_exporter_of_engine(load_settings().tracing)
        leave_nodes_as_they_are(config)
        server = _Server.sync_init(config)
        await server.start()
        return cls(server, await server.__serve_build_asgi_app__())

    @property
    def errored(self) -> bool:
        """Whether it is dead."""
        return bool(self._client.errored)

    @property
    def unfinished(self) -> int:
        """Requests that it has not finished."""
        return int(self._client.output_processor.get_num_unfinished_requests())

    async def check_health(self) -> None:
        """Raise whatever vLLM raises if it is dead."""
        await self._server.check_health()

    async def abort(self, run: Run) -> None:
        """End what it does for the request of `run`, so that it still tells its usage."""
        await self._client.abort(_running_for(run, self._client.output_processor))

    def kill(self) -> None:
        """Kill its processes, so that its requests fail at once.

        They are the only ones that are started in the replica.
        """
        for process in multiprocessing.active_children():
            process.kill()

    async def stop(self) -> None:
        """Stop it."""
        await self._server.engine.shutdown()


class _Server(LLMServer):
    """An LLMServer that is no deployment itself, and counts nothing for Ray's statistics."""

    async def _start_engine(self) -> None:
        # Ray's own then waits for an actor on the head that keeps what its usage statistics tell of
        # models, though they are off: seconds of a start, a process that stays, and no start at all
        # while the head is away.
        await self.engine.start()

    # Serve would await it; there `Engine.stop` does what it would.
    def __del__(self) -> None:
        """Do nothing."""


def llm_config(model: ModelArgs) -> LLMConfig:
    """Return what Ray's LLMServer is to run. Raises ConfigError where weights are missing."""
    device: dict[str, Any] = (
        {"accelerator_config": {"kind": "cpu"}}
        if model.device == "cpu"
        else {"accelerator_type": model.accelerator_type}
    )
    settings = load_settings()
    files = find_files(model, settings.service.models_path)
    return LLMConfig(
        model_loading_config={"model_id": model.name, "model_source": files.weights},
        engine_kwargs={
            **_adapter_arguments(files),
            **_tracing_arguments(settings.tracing),
            **model.engine,
        },
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


def _adapter_arguments(files: ModelFiles) -> dict[str, Any]:
    """Return the engine arguments by which vLLM loads the adapters when it starts."""
    if not files.adapters:
        return {}
    return {
        "enable_lora": True,
        "lora_modules": [{"name": one.name, "path": one.path} for one in files.adapters],
        "max_loras": len(files.adapters),
        "max_lora_rank": _rank_of_engine(max(one.rank for one in files.adapters)),
    }


def _rank_of_engine(rank: int) -> int:
    """Return the lowest rank that vLLM offers and that holds `rank`."""
    from vllm.config.lora import LoRAConfig, MaxLoRARanks

    if rank == 0:
        return int(LoRAConfig.max_lora_rank)
    offered = sorted(get_args(MaxLoRARanks))
    return int(next((r for r in offered if r >= rank), offered[-1]))


def _running_for(run: Run, outputs: Any) -> list[str]:
    """Return the ids that vLLM's endpoints gave to what they do for the request of `run`.

    They make them of its X-Request-ID, with a prefix by endpoint and mostly a suffix by prompt:
    see `request_id` in vllm/entrypoints.
    """
    if not run.request_id:
        return []
    return [name for name in outputs.external_req_ids if run.request_id in name]
