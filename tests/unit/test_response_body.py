"""Requests for responses: what is refused because the engine would take it and not do it."""

from __future__ import annotations

from typing import Any

import pytest

from serve_app.completions.response_body import LOGPROBS, check_response
from serve_app.config import Bodies
from serve_app.errors import InvalidRequest, UnsupportedParameter
from serve_app.stored.keeping import Wish, read_wish

FUNCTION = {"type": "function", "name": "f", "parameters": {}}


def body(**fields: Any) -> dict[str, Any]:
    """Return a body."""
    return {"model": "small", "input": "Hi", **fields}


@pytest.mark.parametrize(
    "fields",
    [
        {"input": [{"role": "user", "content": "Hi"}]},
        {"input": [{"type": "message", "role": "user", "content": []}]},
        {"input": [{"type": "function_call_output", "call_id": "c", "output": "1"}]},
        {"tools": [FUNCTION], "tool_choice": {"type": "function", "name": "f"}},
        {"tools": None, "tool_choice": "auto", "parallel_tool_calls": True},
        {"include": [LOGPROBS], "top_logprobs": 3},
        {"include": [], "top_logprobs": 0},
        {"reasoning": {"effort": "low", "summary": None}},
        {"text": {"format": {"type": "json_object"}, "verbosity": None}},
    ],
)
def test_what_the_engine_does_passes(fields: dict[str, Any]) -> None:
    assert check_response(body(**fields)) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": {}}, "input"),
        ({"input": ["Hi"]}, "input[0]"),
        ({"input": [{"type": 1}]}, "input[0].type"),
        ({"tools": {}}, "tools"),
        ({"tools": ["f"]}, "tools[0]"),
        ({"tool_choice": 1}, "tool_choice"),
        ({"include": LOGPROBS}, "include"),
        ({"include": [1]}, "include[0]"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"reasoning": "low"}, "reasoning"),
        ({"text": "json"}, "text"),
    ],
)
def test_wrong_values_are_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        check_response(body(**fields))
    assert raised.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": [{"role": "user"}, {"type": "item_reference", "id": "x"}]}, "input[1].type"),
        ({"tools": [FUNCTION, {"type": "web_search"}]}, "tools[1].type"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"include": ["reasoning.encrypted_content"]}, "include[0]"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
    ],
)
def test_what_would_be_ignored_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(UnsupportedParameter) as raised:
        check_response(body(**fields))
    assert raised.value.param == param


@pytest.mark.parametrize(
    ("fields", "bodies", "wish"),
    [
        ({}, Bodies.FULL, Wish(store=True, background=False, previous_id=None)),
        ({}, Bodies.NONE, Wish(store=False, background=False, previous_id=None)),
        ({"store": None}, Bodies.FULL, Wish(store=True, background=False, previous_id=None)),
        ({"store": False}, Bodies.NONE, Wish(store=False, background=False, previous_id=None)),
        (
            {"background": True, "previous_response_id": "resp_1"},
            Bodies.FULL,
            Wish(store=True, background=True, previous_id="resp_1"),
        ),
    ],
)
def test_what_is_asked_of_the_store(fields: dict[str, Any], bodies: Bodies, wish: Wish) -> None:
    assert read_wish(body(**fields), bodies) == wish


@pytest.mark.parametrize(
    ("fields", "bodies", "param"),
    [
        ({"store": True}, Bodies.NONE, "store"),
        ({"store": "yes"}, Bodies.FULL, "store"),
        ({"background": 1}, Bodies.FULL, "background"),
        ({"background": True, "store": False}, Bodies.FULL, "background"),
        ({"background": True}, Bodies.NONE, "background"),
        ({"background": True, "stream": True}, Bodies.FULL, "background"),
        ({"previous_response_id": 1}, Bodies.FULL, "previous_response_id"),
    ],
)
def test_what_the_store_cannot_do(fields: dict[str, Any], bodies: Bodies, param: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        read_wish(body(**fields), bodies)
    assert raised.value.param == param
