"""Several models, with the official client's own methods."""

from __future__ import annotations

import array
import base64
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion
from pydantic import BaseModel, Field

from tests.e2e.tools import WEATHER
from tests.serve_configs import (
    ADAPTER,
    ANSWER,
    EMBEDDING_MODEL,
    FAKE_MODEL,
    QUESTION,
    REAL_MODEL,
    with_embedding_model,
)
from tests.stack_runner import START_TIMEOUT_S, RunningStack, wait_until

_TEXTS = ["Paris is the capital of France.", "Bananas are yellow.", "x"]

# What must go on while other models come and go.
_STEADY = (
    "ray::ServeReplica:gateway:",
    f"ray::ServeReplica:{REAL_MODEL}:",
    f"ray::ServeReplica:{FAKE_MODEL}:",
)


def _steady(stack: RunningStack) -> dict[str, set[int]]:
    return {title: {p.pid for p in stack.processes(title)} for title in _STEADY}


@pytest.fixture(scope="module", autouse=True)
def before(stack: RunningStack) -> Iterator[dict[str, set[int]]]:
    """Add the embedding model for the tests below; tell which processes ran before."""
    steady = _steady(stack)
    stack.deploy(with_embedding_model(stack.config()))
    wait_until(partial(_is_ready, stack, EMBEDDING_MODEL), "it runs", START_TIMEOUT_S)
    wait_until(partial(_is_offered, stack, EMBEDDING_MODEL, True), "all offer it", 60)
    yield steady
    stack.deploy(stack.config())


def _is_ready(stack: RunningStack, model: str) -> bool:
    parts = httpx.get(f"{stack.url}/ready", timeout=10).json().get("parts", {})
    return parts.get(f"model {model}") is True


def _is_offered(stack: RunningStack, model: str, offered: bool) -> bool:
    """Tell whether both gateways offer `model`, or none does; each is asked several times."""
    answers = {
        httpx.get(f"{stack.url}/v1/models/{model}", headers=stack.bootstrap).status_code
        for _ in range(12)
    }
    return answers == ({200} if offered else {404})


def test_a_model_added_by_config_restarts_nothing_else(
    stack: RunningStack, before: dict[str, set[int]]
) -> None:
    assert all(before.values())
    assert _steady(stack) == before


@pytest.mark.parametrize(
    "process", ["ray::TelemetryAgent", "/log_monitor.py", "/autoscaler/_private/monitor.py"]
)
def test_ray_runs_no_process_that_nobody_needs(stack: RunningStack, process: str) -> None:
    assert stack.processes("ray::DashboardAgent")
    assert not stack.processes(process)


_REFERENCE = """
import json, sys, torch
from transformers import AutoModel, AutoTokenizer
folder, texts = sys.argv[1], json.loads(sys.argv[2])
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
inputs = tokenizer(texts, padding=True, return_tensors="pt")
with torch.no_grad():
    states = model(**inputs).last_hidden_state
mask = inputs["attention_mask"].unsqueeze(-1)
mean = (states * mask).sum(1) / mask.sum(1)
print(json.dumps(torch.nn.functional.normalize(mean).tolist()))
"""


@pytest.fixture(scope="module")
def reference(stack: RunningStack) -> list[list[float]]:
    """What sentence-transformers computes: the mean of the last states, of length 1."""
    folder = Path(stack.env["COMP_AI_MODEL_PATH"]) / EMBEDDING_MODEL
    done = subprocess.run(
        [sys.executable, "-c", _REFERENCE, str(folder), json.dumps(_TEXTS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    vectors: list[list[float]] = json.loads(done.stdout.strip().splitlines()[-1])
    return vectors


def _cosine(one: list[float], other: list[float]) -> float:
    dot = sum(a * b for a, b in zip(one, other, strict=True))
    return dot / math.hypot(*one) / math.hypot(*other)


# The client asks for base64 where no format is named, and decodes it.
@pytest.mark.parametrize("encoding", [None, "float", "base64"])
def test_embeddings_equal_those_of_transformers(
    client: OpenAI, reference: list[list[float]], encoding: str | None
) -> None:
    options = {"encoding_format": encoding} if encoding else {}
    answer = client.embeddings.create(model=EMBEDDING_MODEL, input=_TEXTS, **options)  # type: ignore[arg-type]
    assert answer.usage.prompt_tokens == 9 + 6 + 3
    assert [item.index for item in answer.data] == [0, 1, 2]
    for item, expected in zip(answer.data, reference, strict=True):
        vector = item.embedding
        if isinstance(vector, str):
            vector = _decoded(vector)
        assert _cosine(vector, expected) > 0.999
        assert math.isclose(math.hypot(*vector), 1, abs_tol=1e-3)


def _decoded(text: str) -> list[float]:
    return list(array.array("f", base64.b64decode(text)))


def test_embeddings_are_in_the_accounts(stack: RunningStack) -> None:
    token = stack.cli("token", "--subject", "emma").strip()
    client = OpenAI(base_url=f"{stack.url}/v1", api_key=token, max_retries=0)
    before = stack.engine(EMBEDDING_MODEL)["prompt_tokens"]
    client.embeddings.create(model=EMBEDDING_MODEL, input=_TEXTS)
    [row] = stack.settled_rows("select * from comp_ai.requests where principal_id = 'emma'", 1)
    assert (row["outcome"], row["prompt_tokens"], row["completion_tokens"]) == ("completed", 18, 0)
    assert stack.engine(EMBEDDING_MODEL)["prompt_tokens"] - before == 18


def test_an_alias_stands_for_its_model(client: OpenAI) -> None:
    one = client.embeddings.create(model="text-embedding-3-small", input="x").data[0].embedding
    other = client.embeddings.create(model=EMBEDDING_MODEL, input="x").data[0].embedding
    assert _cosine(one, other) > 0.9999


@pytest.mark.parametrize("path", ["/v1/rerank", "/v1/score"])
def test_the_embedding_model_ranks_texts(stack: RunningStack, path: str) -> None:
    query, texts = "Which city is the capital of France?", _TEXTS[:2]
    asked = (
        {"query": query, "documents": texts}
        if path == "/v1/rerank"
        else {"text_1": query, "text_2": texts}
    )
    answer = httpx.post(
        f"{stack.url}{path}", headers=stack.bootstrap, json={"model": EMBEDDING_MODEL} | asked
    )
    assert answer.status_code == 200, answer.text
    if path == "/v1/rerank":
        assert [result["index"] for result in answer.json()["results"]] == [0, 1]
    else:
        capital, bananas = (item["score"] for item in answer.json()["data"])
        assert capital > bananas


def test_models_are_listed_with_their_adapters(client: OpenAI) -> None:
    listed = {model.id for model in client.models.list()}
    assert {REAL_MODEL, ADAPTER, EMBEDDING_MODEL, FAKE_MODEL} <= listed
    assert client.models.retrieve(ADAPTER).id == ADAPTER


def test_an_adapter_answers_in_its_own_way_and_its_model_as_before(
    stack: RunningStack, client: OpenAI
) -> None:
    answers = {}
    for model in (REAL_MODEL, ADAPTER, REAL_MODEL):
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            max_tokens=12,
        )
        assert answer.model == model
        answers[model] = answer.choices[0].message.content
    assert answers[REAL_MODEL] == ANSWER
    assert answers[ADAPTER] != answers[REAL_MODEL]
    rows = stack.settled_rows("select 1 from comp_ai.requests where model = $1", 1, ADAPTER)
    assert rows


_TOOL_NAME = "get_weather"
_WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": _TOOL_NAME}}]
)
def test_a_required_tool_is_called_with_valid_arguments(client: OpenAI, choice: Any) -> None:
    asked: Any = {
        "model": REAL_MODEL,
        "messages": _WEATHER,
        "tools": [WEATHER],
        "tool_choice": choice,
        "temperature": 0,
        "max_tokens": 80,
    }
    whole = client.chat.completions.create(**asked)
    with client.chat.completions.stream(**asked) as stream:
        streamed = stream.get_final_completion()
    for answer in (whole, streamed):
        [call] = answer.choices[0].message.tool_calls or []
        assert call.type == "function"
        assert call.function.name == _TOOL_NAME
        assert list(json.loads(call.function.arguments)) == ["city"]


def test_the_result_of_a_tool_is_answered(client: OpenAI) -> None:
    call = {"name": _TOOL_NAME, "arguments": '{"city": "Paris"}'}
    answer = client.chat.completions.create(
        model=REAL_MODEL,
        messages=[
            {"role": "user", "content": "What is the weather in Paris?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "call_1", "type": "function", "function": call}],  # type: ignore[list-item]
            },
            {"role": "tool", "tool_call_id": "call_1", "content": "It is sunny, 25 degrees."},
        ],
        tools=[WEATHER],
        temperature=0,
        max_tokens=40,
    )
    assert "sunny" in (answer.choices[0].message.content or "")


class Person(BaseModel):
    """What the model is made to say."""

    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=150)


def test_structured_output_fits_its_schema(client: OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=REAL_MODEL,
        messages=[{"role": "user", "content": "Ada is 36 years old. Who is she, as JSON?"}],
        response_format=Person,
        temperature=0,
        max_tokens=80,
    )
    assert isinstance(answer.choices[0].message.parsed, Person)


def test_logprobs_choices_stops_and_seeds(client: OpenAI) -> None:
    def ask(**more: Any) -> ChatCompletion:
        asked: Any = {
            "model": REAL_MODEL,
            "messages": [{"role": "user", "content": QUESTION}],
            "max_tokens": 12,
            "temperature": 0,
        }
        answer: ChatCompletion = client.chat.completions.create(**asked | more)
        return answer

    logged = ask(logprobs=True, top_logprobs=2).choices[0].logprobs
    assert logged is not None
    tokens = logged.content or []
    assert "".join(t.token for t in tokens).startswith(ANSWER)
    assert all(len(t.top_logprobs) == 2 and t.logprob <= 0 for t in tokens)

    assert len({c.message.content for c in ask(n=3, temperature=1.5, seed=5).choices}) > 1
    stopped = ask(stop=["Japan"]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == ("The capital of ", "stop")
    texts = {ask(temperature=1.5, seed=7).choices[0].message.content for _ in range(3)}
    assert len(texts) == 1


def _ask(stack: RunningStack, model: str) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
    return httpx.post(f"{stack.url}/v1/chat/completions", headers=stack.bootstrap, json=body)


def test_a_model_removed_by_config_takes_its_engine_along_and_nothing_else(
    stack: RunningStack, before: dict[str, set[int]]
) -> None:
    engines = len(stack.processes("VLLM::EngineCore"))
    stack.deploy(stack.config())
    wait_until(partial(_is_offered, stack, EMBEDDING_MODEL, False), "it is gone", 60)
    wait_until(lambda: not stack.replicas(f"Model:{EMBEDDING_MODEL}"), "its replica is gone", 60)
    wait_until(
        lambda: len(stack.processes("VLLM::EngineCore")) == engines - 1, "its engine is gone", 60
    )
    assert _steady(stack) == before
    assert _ask(stack, REAL_MODEL).status_code == 200
