"""The items that a response is made of: as a client sends them, lists them and continues them.

What a client sent is kept as it came, so that the engine sees the same again; only ids are
added, and those stand beside the item.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import orjson

Item = dict[str, Any]

_PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
}


@dataclass(frozen=True, slots=True)
class InputItem:
    """One item of a request, and the id under which it is listed."""

    id: str
    item: Item

    @classmethod
    def of(cls, item: Item) -> Self:
        """Return `item` with its own id, or with a new one."""
        named = item.get("id")
        prefix = _PREFIXES.get(_type(item), "item")
        return cls(named if isinstance(named, str) and named else _new_id(prefix), item)

    def listed(self) -> Item:
        """Return the item in full form, as `input_items` lists it."""
        if _type(self.item) != "message":
            return {"status": "completed", **self.item, "id": self.id}
        return {
            "status": "completed",
            **self.item,
            "id": self.id,
            "type": "message",
            "content": _parts(self.item),
        }


def input_items(given: object) -> list[InputItem]:
    """Return the items of an `input`, which may be a text."""
    if isinstance(given, str):
        return [InputItem.of({"type": "message", "role": "user", "content": given})]
    return [InputItem.of(item) for item in given] if isinstance(given, list) else []


def dump_items(items: Iterable[InputItem]) -> bytes:
    """Return `items` as JSON, for the store."""
    return orjson.dumps([{"id": one.id, "item": one.item} for one in items])


def load_items(text: bytes) -> list[InputItem]:
    """Return what `dump_items` wrote."""
    return [InputItem(one["id"], one["item"]) for one in orjson.loads(text)]


def output_items(response: dict[str, Any]) -> list[InputItem]:
    """Return the output of a response as the items that a continuation begins with."""
    output = response.get("output")
    found = output if isinstance(output, list) else []
    # The engine reads the first part of a message unseen, and fails where there is none.
    return [InputItem.of(item) for item in found if _type(item) != "message" or item["content"]]


def _type(item: Item) -> str:
    return str(item.get("type") or "message")


def _parts(item: Item) -> Any:
    content = item.get("content")
    if not isinstance(content, str):
        return content
    if item.get("role") == "assistant":
        return [{"type": "output_text", "text": content, "annotations": []}]
    return [{"type": "input_text", "text": content}]


def _new_id(prefix: str) -> str:
    return f"{prefix}_{os.urandom(16).hex()}"
