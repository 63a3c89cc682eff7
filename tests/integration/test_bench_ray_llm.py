"""The fake engine in Ray's own server of a model, as the comparison starts it."""

from __future__ import annotations

import inspect

import httpx
from ray.serve.llm import LLMConfig

from load_tests.bench.ray_llm import FakeRayEngine
from tests.serve_configs import FAKE_MODEL


async def test_it_is_an_engine_to_ray_and_answers_by_itself() -> None:
    assert not inspect.isabstract(FakeRayEngine)
    speed = {"time_to_first_token_s": 0.0, "time_per_token_s": 0.0}
    config = LLMConfig(
        model_loading_config={"model_id": FAKE_MODEL},
        experimental_configs={"fake_speed": speed},
        accelerator_config={"kind": "cpu"},
    )
    transport = httpx.ASGITransport(await FakeRayEngine(config).build_asgi_app())
    body = {"model": FAKE_MODEL, "max_tokens": 2, "messages": [{"role": "user", "content": "x"}]}
    async with httpx.AsyncClient(transport=transport, base_url="http://engine") as http:
        assert (await http.get("/v1/models")).status_code == 200
        answer = await http.post("/v1/chat/completions", json=body)
    assert answer.json()["choices"][0]["message"]["content"] == "w0 w1 "
