"""The frameworks that people use, as they are used, on the real engine: form, not wit."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import pytest
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.serve_configs import ANSWER, QUESTION, REAL_MODEL
from tests.stack_runner import RunningStack

_QUESTION = "Is Paris in France? Answer with JSON."


class Verdict(BaseModel):
    """Says whether a statement holds."""

    # Values that a small model cannot make long.
    true: bool
    certainty: Literal["low", "high"]


@pytest.fixture
def llm(stack: RunningStack, api_key: str) -> ChatOpenAI:
    return ChatOpenAI(
        model=REAL_MODEL,
        base_url=f"{stack.url}/v1",
        api_key=api_key,
        temperature=0,
        max_completion_tokens=200,
        max_retries=0,
    )


@pytest.fixture
def model(stack: RunningStack, api_key: str) -> OpenAIChatModel:
    provider = OpenAIProvider(base_url=f"{stack.url}/v1", api_key=api_key)
    return OpenAIChatModel(REAL_MODEL, provider=provider)


def test_langchain_answers_and_counts(llm: ChatOpenAI) -> None:
    answer = llm.invoke(QUESTION)
    assert answer.text == ANSWER
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] > 0


def test_langchain_streams_what_it_answers(llm: ChatOpenAI) -> None:
    # With an address that is not OpenAI's, LangChain asks for usage only where told to.
    parts = list(llm.stream(QUESTION, stream_usage=True))
    assert len(parts) > 3
    assert "".join(part.text for part in parts) == llm.invoke(QUESTION).text
    assert sum((part.usage_metadata or {}).get("output_tokens", 0) for part in parts) > 0


@pytest.mark.parametrize("choice", ["Verdict", "required"])
@pytest.mark.parametrize("stream", [False, True])
def test_langchain_calls_tools(llm: ChatOpenAI, choice: str, stream: bool) -> None:
    bound = llm.bind_tools([Verdict], tool_choice=choice)
    if stream:
        first, *rest = bound.stream(_QUESTION)
        answer: Any = first
        for part in rest:
            answer += part
    else:
        answer = bound.invoke(_QUESTION)
    assert answer.tool_calls
    assert answer.tool_calls[0]["name"] == "Verdict"
    Verdict.model_validate(answer.tool_calls[0]["args"])


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_structured_output(llm: ChatOpenAI, method: Any) -> None:
    answer = llm.with_structured_output(Verdict, method=method).invoke(_QUESTION)
    assert isinstance(answer, Verdict)


@pytest.mark.parametrize("output", [ToolOutput, NativeOutput])
def test_pydantic_ai_structured_output(model: OpenAIChatModel, output: Any) -> None:
    settings: Any = {"max_tokens": 200, "temperature": 0}
    answer = Agent(model, output_type=output(Verdict), model_settings=settings).run_sync(_QUESTION)
    assert isinstance(answer.output, Verdict)
    assert answer.usage.output_tokens > 0


def test_pydantic_ai_streams(model: OpenAIChatModel) -> None:
    async def asked() -> Verdict:
        settings: Any = {"max_tokens": 200, "temperature": 0}
        agent = Agent(model, output_type=ToolOutput(Verdict), model_settings=settings)
        async with agent.run_stream(_QUESTION) as answer:
            return await answer.get_output()

    assert isinstance(asyncio.run(asked()), Verdict)
