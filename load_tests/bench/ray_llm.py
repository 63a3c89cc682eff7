"""Ray Serve LLM's own OpenAI app, as its users start it, on a Ray of its own."""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import uuid
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import orjson
import ray
from fastapi import FastAPI
from ray import serve
from ray.llm._internal.serve.core.configs.openai_api_models import ChatCompletionResponse
from ray.llm._internal.serve.core.engine.protocol import LLMEngine
from ray.serve.llm import LLMConfig, build_openai_app
from ray.serve.llm.deployment import LLMServer
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from load_tests.bench.engines import Engine
from serve_app.fake_engine import FakeEngine, FakeEngineConfig
from tests.serve_configs import FAKE_MODEL

_CLAIMED_CORES = 8


class FakeRayEngine(LLMEngine):  # type: ignore[misc]
    """Our fake engine with the face that Ray's LLMServer wants of an engine.

    That face is internal to Ray; nothing but this comparison uses it.
    """

    def __init__(self, llm_config: LLMConfig) -> None:
        speed = llm_config.experimental_configs["fake_speed"]
        self._engine = FakeEngine(FakeEngineConfig(**speed))

    async def start(self) -> None:
        """Nothing is to be loaded."""

    def routing_stats(self) -> dict[str, Any]:
        """Nothing is told to the router."""
        return {}

    async def resolve_lora(self, lora_model: Any) -> None:
        """There are no adapters."""

    async def chat(self, request: Any, _raw: Any = None) -> AsyncGenerator[Any, None]:
        """Answer as `FakeEngine` does: frames as text, or one whole answer."""
        body = request.model_dump(exclude_none=True)
        answer = await self._engine.chat(uuid.uuid4().hex, body)
        if isinstance(answer, StreamingResponse):
            async for frame in answer.body_iterator:
                assert isinstance(frame, bytes)
                yield frame.decode()
        else:
            yield ChatCompletionResponse(**orjson.loads(answer.body))

    async def completions(self, request: Any, _raw: Any = None) -> Any:
        """Not part of the comparison."""
        raise NotImplementedError

    embeddings = transcriptions = tokenize = detokenize = completions

    async def reset_prefix_cache(self) -> None:
        """Nothing is cached."""

    async def build_asgi_app(self) -> FastAPI:
        """Return what answers by itself where Ray streams directly; Ray adds a route of its own."""
        return FastAPI(routes=[*self._engine.app().routes, Route("/v1/models", _models)])

    async def check_health(self) -> None:
        """It is always well."""


async def _models(_: Request) -> Response:
    return JSONResponse({"object": "list", "data": []})


class FakeServer(LLMServer):  # type: ignore[misc]
    """Ray's own server of a model, with the fake engine in it."""

    _default_engine_cls = FakeRayEngine


def main() -> None:
    """Serve until the process is ended."""
    given = _arguments()
    # In an own cluster, whatever else this machine runs.
    os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ray-")
    # Its parts claim more than two cores, and would wait for them; none of them is held to that.
    cores = max(_CLAIMED_CORES, os.cpu_count() or 1)
    ray.init(address="local", num_cpus=cores, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": given.port})
    if given.engine is not None:
        config = _real(Engine.loads(given.engine))
    else:
        config = _fake(given.time_to_first_token_s, given.time_per_token_s)
    serve.run(build_openai_app({"llm_configs": [config]}), blocking=False)
    signal.sigwait([signal.SIGTERM, signal.SIGINT])
    ray.shutdown()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--engine", help="a real one, as `Engine.dumps` writes it")
    parser.add_argument("--time-to-first-token-s", type=float, help="of the fake engine")
    parser.add_argument("--time-per-token-s", type=float, help="of the fake engine")
    return parser.parse_args()


def _real(engine: Engine) -> LLMConfig:
    return LLMConfig(
        model_loading_config={"model_id": engine.model, "model_source": engine.weights},
        engine_kwargs=engine.arguments,
        deployment_config=_deployment(),
        accelerator_config={"kind": engine.device},
    )


def _fake(time_to_first_token_s: float, time_per_token_s: float) -> LLMConfig:
    speed = {
        "time_to_first_token_s": time_to_first_token_s,
        "time_per_token_s": time_per_token_s,
    }
    return LLMConfig(
        model_loading_config={"model_id": FAKE_MODEL, "model_source": str(Path.cwd())},
        experimental_configs={"fake_speed": speed},
        deployment_config=_deployment(),
        server_cls=FakeServer,
        accelerator_config={"kind": "cpu"},
    )


def _deployment() -> dict[str, Any]:
    return {"max_ongoing_requests": 5000, "ray_actor_options": {"num_cpus": 0.1}}


if __name__ == "__main__":
    main()
