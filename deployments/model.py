"""A model: vLLM in a Serve replica, asked over HTTP under a lease that Ray hands out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import prometheus_client
from pydantic import BaseModel, ConfigDict, Field
from ray.serve import Application
from ray.serve.llm import LLMConfig, build_llm_deployment
from ray.serve.llm.deployment import LLMServer

from deployments.leasing import Leasing, replica_id
from serve_app.config import Name, parse_config
from serve_app.engine_counters import EngineCounters, read_engine_counters
from serve_app.errors import ConfigError
from serve_app.replica import Slot
from serve_app.settings import load_settings


class ModelArgs(BaseModel):
    """`args` of a model's Serve application."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name = Field(description="Name that the engine serves the model under.")
    weights: str = Field(
        min_length=1,
        description="Folder of the weights, absolute or below COMP_AI_MODEL_PATH; "
        "or `hub:<organisation>/<model>` to let the engine fetch them.",
    )
    device: Literal["cpu", "gpu"] = Field(description="What the engine computes on.")
    accelerator_type: str | None = Field(
        default=None, description="Ray's name of the GPU, for example H100; any where not set."
    )
    engine: dict[str, Any] = Field(
        default_factory=dict, description="vLLM engine arguments, by their Python names."
    )
    replica_cpus: float = Field(
        default=0.5, ge=0, description="CPUs that Ray sets aside for the replica's own process."
    )


def build(args: dict[str, Any]) -> Application:
    """Build the Serve application of one model from its `args` in the config YAML.

    Raises:
        ConfigError: for an unknown setting, a wrong value, or weights that are not there.
    """
    model = parse_config(ModelArgs, args, "args")
    return build_llm_deployment(_llm_config(model), name_prefix="Model:", deployment_cls=Model)


def _llm_config(model: ModelArgs) -> LLMConfig:
    device: dict[str, Any] = (
        {"accelerator_config": {"kind": "cpu"}}
        if model.device == "cpu"
        else {"accelerator_type": model.accelerator_type}
    )
    return LLMConfig(
        model_loading_config={"model_id": model.name, "model_source": _source(model.weights)},
        engine_kwargs=model.engine,
        deployment_config={"ray_actor_options": {"num_cpus": model.replica_cpus}},
        # vLLM then keeps its counters in this process's Prometheus registry, where the
        # accounts can read them exactly; Ray's copy of them is minutes of delay away.
        log_engine_metrics=False,
        **device,
    )


def _source(weights: str) -> str:
    if weights.startswith("hub:"):
        return weights.removeprefix("hub:")
    folder = load_settings().service.models_path / Path(weights).expanduser()
    if not (folder / "config.json").is_file():
        raise ConfigError(
            "args.weights",
            weights,
            f"a folder with config.json; looked in {folder}. "
            "`comp-ai model fetch` makes the default model",
        )
    return str(folder)


class Model(Leasing, LLMServer):
    """An LLMServer that hands out leases and serves vLLM's own ASGI app under them."""

    async def start(self) -> None:
        """Start the engine, then the HTTP server in front of it."""
        await super().start()
        app = await self.__serve_build_asgi_app__()
        engine = app.state.engine_client

        async def abort(slot: Slot) -> None:
            await engine.abort(_engine_request_ids(slot))

        await self.open_door(app, abort)

    async def engine_counters(self) -> EngineCounters:
        """Return what vLLM counted in this replica since it started."""
        return read_engine_counters(
            prometheus_client.REGISTRY.collect(),
            replica_id=replica_id(),
            live_leases=self.live_leases,
        )

    async def check_health(self) -> None:
        """Fail if the engine or the HTTP server is dead, so that Serve replaces the replica."""
        await super().check_health()
        self.check_door()


def _engine_request_ids(slot: Slot) -> list[str]:
    """Return the ids that vLLM's OpenAI layer gave to the request of `slot`.

    It makes them of the X-Request-ID header: see `_base_request_id` and its callers in
    vllm/entrypoints/openai.
    """
    if slot.path.endswith("/chat/completions"):
        return [f"chatcmpl-{slot.request_id}"]
    return [f"cmpl-{slot.request_id}-{index}" for index in range(slot.prompts)]
