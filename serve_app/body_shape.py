"""The shape of a request's body: its parameters, and how much text there was, without any text."""

from __future__ import annotations

from typing import Any

import orjson

_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_ITEMS = frozenset({"message", "reasoning", "function_call", "function_call_output"})
# Parameters whose value is a word of the interface and no text of anybody's.
_WORDS = frozenset(
    "encoding_format reasoning_effort service_tier tool_choice truncation truncation_side".split()
)
_LONGEST_WORD = 64
_CONVERSATIONS = ("messages", "input")


def shape_of(body: dict[str, Any]) -> str:
    """Return the parameters of a request and the shape of its texts as JSON, without any text.

    Numbers and flags stand as they came. Of a conversation the roles and lengths stay, of tools
    their names, of anything else how much it was.
    """
    return orjson.dumps({name: _shape(name, value) for name, value in body.items()}).decode()


def _shape(name: str, value: object) -> object:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str) and name in _WORDS and len(value) <= _LONGEST_WORD:
        return value
    if name in _CONVERSATIONS and isinstance(value, list):
        return [_turn(item) if isinstance(item, dict) else _measure(item) for item in value]
    if name == "tools" and isinstance(value, list):
        return [_tool_name(tool) for tool in value]
    return _measure(value)


def _turn(item: dict[str, Any]) -> dict[str, object]:
    known: dict[str, object] = {}
    if (role := item.get("role")) in _ROLES:
        known["role"] = role
    if (kind := item.get("type")) in _ITEMS:
        known["type"] = kind
    rest = {name: value for name, value in item.items() if name not in known}
    return {**known, "characters": _characters(rest)}


def _tool_name(tool: object) -> str | None:
    if not isinstance(tool, dict):
        return None
    function = tool.get("function")
    name = function.get("name") if isinstance(function, dict) else tool.get("name")
    return name[:_LONGEST_WORD] if isinstance(name, str) else None


def _measure(value: object) -> dict[str, int]:
    count = {"items": len(value)} if isinstance(value, list) else {}
    return {**count, "characters": _characters(value)}


def _characters(value: object) -> int:
    """Return how many characters the texts in `value` have together."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 0
