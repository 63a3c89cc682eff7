"""What the lists of the API have in common: how their query is read, and the form of a page."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any

import orjson
from starlette.requests import Request

from serve_app.completions.parts import Document
from serve_app.errors import InvalidRequest, UnsupportedParameter
from serve_app.times import parse_time

ORDERS = ("asc", "desc")


class Query:
    """The query of a request, checked where it is read.

    Args:
        request: whose query it is.
        known: parameters that may stand in it.
        flags: parameters that may stand in it where they are `false`.

    Raises:
        UnsupportedParameter: a parameter that would not be honoured.
        InvalidRequest: a parameter that stands there twice: which one holds is not said.
    """

    def __init__(
        self, request: Request, known: Collection[str] = (), flags: Collection[str] = ()
    ) -> None:
        self._parameters = request.query_params
        for name, value in self._parameters.multi_items():
            if name not in known and not (name in flags and value == "false"):
                raise UnsupportedParameter(
                    f"The parameter `{name[:100]}` is not supported here. Leave it out.",
                    param=name[:100],
                )
            if len(self._parameters.getlist(name)) > 1:
                raise InvalidRequest(f"`{name}` stands in the query twice.", param=name)

    def text(self, name: str) -> str | None:
        """Return a text; an empty one is none."""
        value = self._parameters.get(name) or None
        if value is not None and "\x00" in value:
            raise InvalidRequest(f"`{name}` holds a character that no text here has.", param=name)
        return value

    def time(self, name: str) -> datetime | None:
        """Return a time; one without a zone is in UTC. An empty text is none of them."""
        value = self._parameters.get(name)
        try:
            return None if value is None else parse_time(value)
        except (ValueError, OverflowError):
            message = f"`{name}` must be a time as ISO 8601 writes it: 2026-01-31T12:00:00Z."
            raise InvalidRequest(message, param=name) from None

    def uuid(self, name: str) -> uuid.UUID | None:
        """Return a UUID; an empty text is none of them."""
        value = self._parameters.get(name)
        try:
            return None if value is None else uuid.UUID(value)
        except ValueError:
            raise InvalidRequest(f"`{name}` must be a UUID.", param=name) from None

    def one_of(self, name: str, allowed: Collection[str]) -> str | None:
        """Return one of the `allowed` words; an empty one is none of them."""
        value = self._parameters.get(name)
        if value is not None and value not in allowed:
            message = f"`{name}` must be one of {', '.join(allowed)}."
            raise InvalidRequest(message, param=name)
        return value

    def newest_first(self) -> bool:
        """Return whether `order` is `desc`, which it is where it is not named."""
        order = self._parameters.get("order", "desc")
        if order not in ORDERS:
            raise InvalidRequest(f"`order` must be one of {', '.join(ORDERS)}.", param="order")
        return order == "desc"

    def limit(self, most: int, default: int) -> int:
        """Return `limit`, a whole number from 1 to `most`."""
        number = self.number("limit", 1, most)
        return default if number is None else number

    def number(self, name: str, least: int, most: int) -> int | None:
        """Return a whole number from `least` to `most`."""
        value = self._parameters.get(name)
        if value is None:
            return None
        good = value.isascii() and value.isdigit() and len(value) <= len(str(most))
        if not good or not least <= int(value) <= most:
            message = f"`{name}` must be a whole number from {least} to {most}."
            raise InvalidRequest(message, param=name)
        return int(value)


def query_docs(*parameters: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what FastAPI is told of query parameters: a name and a schema each."""
    return {
        "parameters": [
            {"name": name, "in": "query", "schema": schema} for name, schema in parameters
        ]
    }


_TIME = {"type": "string", "format": "date-time"}
SINCE: dict[str, Any] = {**_TIME, "description": "First moment; in UTC where it names no zone."}
UNTIL: dict[str, Any] = {
    **_TIME,
    "description": "First moment after the last one that is wanted.",
}
AFTER: tuple[str, dict[str, Any]] = (
    "after",
    {"type": "string", "description": "Id of the object that the page before ended with."},
)
ORDER: tuple[str, dict[str, Any]] = (
    "order",
    {"type": "string", "enum": list(ORDERS), "default": "desc"},
)


def limit_docs(most: int, default: int) -> tuple[str, dict[str, Any]]:
    """Return the parameter `limit` for `query_docs`."""
    return ("limit", {"type": "integer", "minimum": 1, "maximum": most, "default": default})


def document(value: dict[str, Any]) -> Document:
    """Return `value` as an answer."""
    return Document(orjson.dumps(value))


def page(found: Sequence[dict[str, Any]], limit: int) -> Document:
    """Return a list of OpenAI's; one more than `limit` was asked for, to know of more."""
    data = found[:limit]
    return document(
        {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": len(found) > limit,
        }
    )
