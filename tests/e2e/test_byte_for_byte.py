"""The same requests through Comp AI and to the engine itself: the same bytes come back.

Ids and the time of making are the only difference, and one field: vLLM puts its
`system_fingerprint` on the last frame of a stream, which is the usage frame that the gateway
always asks for; where the client did not, it goes with that frame.

Each request is sent once before, so that both find the engine's cache of prompts warm: a
cached prompt is computed in other pieces, and its logprobs then differ in the last digit.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.bare_engine import BareEngine, bare_engine
from tests.e2e.tools import WEATHER
from tests.serve_configs import ADAPTER, REAL_MODEL
from tests.stack_runner import RunningStack

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
_QUESTION = [{"role": "user", "content": "Name three colours."}]
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {"messages": _QUESTION, "temperature": 0}),
    "chat of an adapter": (CHAT, {"messages": _QUESTION, "temperature": 0, "model": ADAPTER}),
    "seed": (CHAT, {"messages": _QUESTION, "temperature": 1.3, "seed": 11, "top_p": 0.9}),
    "logprobs": (CHAT, {"messages": _QUESTION, "temperature": 0, "logprobs": True}),
    "top logprobs": (
        CHAT,
        {"messages": _QUESTION, "temperature": 0, "logprobs": True, "top_logprobs": 3},
    ),
    "n": (CHAT, {"messages": _QUESTION, "temperature": 1, "seed": 3, "n": 2}),
    "stop": (CHAT, {"messages": _QUESTION, "temperature": 0, "stop": ["e"]}),
    "penalties": (
        CHAT,
        {"messages": _QUESTION, "temperature": 0, "presence_penalty": 1, "frequency_penalty": 0.5},
    ),
    "tools": (
        CHAT,
        {"messages": _QUESTION, "temperature": 0, "tools": [WEATHER], "tool_choice": "required"},
    ),
    "tool by name": (
        CHAT,
        {
            "messages": _QUESTION,
            "temperature": 0,
            "tools": [WEATHER],
            "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
        },
    ),
    "json": (
        CHAT,
        {"messages": _QUESTION, "temperature": 0, "response_format": {"type": "json_object"}},
    ),
    "text": (TEXT, {"prompt": "The sea is", "temperature": 0}),
    "texts": (TEXT, {"prompt": ["The sea is", "Once upon a time"], "temperature": 0}),
    "text with logprobs": (TEXT, {"prompt": "The sea is", "temperature": 0, "logprobs": 2}),
    "text echoed": (TEXT, {"prompt": "The sea is", "temperature": 0, "echo": True}),
}
WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "stream": {"stream": True},
    "stream with usage": {"stream": True, "stream_options": {"include_usage": True}},
}
_FINGERPRINT = re.compile(rb',"system_fingerprint":"[^"]*"')
_DIFFERENT = re.compile(
    rb'"id":"(?:chatcmpl-|cmpl-|call_)[\w-]+"|"created":\d+|"id":"chatcmpl-tool-\w+"'
)


@pytest.fixture(scope="module")
def engine(stack: RunningStack) -> Iterator[BareEngine]:
    with bare_engine(stack, REAL_MODEL) as bare:
        yield bare


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", REQUESTS)
def test_the_same_bytes(
    stack: RunningStack, engine: BareEngine, api_key: str, name: str, way: str
) -> None:
    path, asked = REQUESTS[name]
    body = {"model": REAL_MODEL, "max_tokens": 12} | asked | WAYS[way]
    engine.post(path, body)
    bare = engine.post(path, body)
    headers = {"Authorization": f"Bearer {api_key}"}
    ours = httpx.post(f"{stack.url}{path}", headers=headers, json=body, timeout=120)
    assert bare.status_code == ours.status_code == 200, bare.text + ours.text
    assert len(bare.content) > 100
    leaving_out = [_DIFFERENT] if way != "stream" else [_DIFFERENT, _FINGERPRINT]
    assert _parts(ours.content, leaving_out) == _parts(bare.content, leaving_out)
    assert _media_type(ours) == _media_type(bare)


def _parts(answer: bytes, leaving_out: list[re.Pattern[bytes]]) -> list[bytes]:
    """Return the frames of a stream, choice by choice, or an answer as it is.

    Which of several choices gets ahead is chance; within each, order counts.
    """
    for pattern in leaving_out:
        answer = pattern.sub(b"", answer)
    return sorted(answer.split(b"\n\n"), key=_choice)


def _choice(frame: bytes) -> int:
    # The first is the choice's own; frames without any come last, as they are sent.
    found = re.search(rb'"choices":\[\{"index":(\d+)', frame)
    return int(found[1]) if found else sys.maxsize


def _media_type(answer: httpx.Response) -> str:
    return answer.headers["content-type"].split(";")[0]
