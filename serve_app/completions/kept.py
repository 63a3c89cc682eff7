"""What the caller of one request wants kept of it; the policy may keep less, and never more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serve_app.config import Bodies
from serve_app.errors import InvalidRequest

HEADER = "x-comp-ai-bodies"


def asked_by_header(values: Sequence[str]) -> Bodies | None:
    """Return the most that a caller wants kept, by its headers; None where there are none.

    Raises:
        InvalidRequest: a word that says nothing here.
    """
    try:
        asked = [Bodies(value.strip().lower()) for value in values]
    except ValueError:
        words = ", ".join(Bodies)
        raise InvalidRequest(
            f"X-Comp-AI-Bodies must be one of {words}. It never keeps more than the policy does.",
            param="X-Comp-AI-Bodies",
        ) from None
    return min(asked, key=lambda one: one.rank, default=None)


def asked_by_body(body: dict[str, Any]) -> Bodies | None:
    """Return `none` where a body says `store: false`, and None where it says nothing."""
    return Bodies.NONE if body.get("store") is False else None
