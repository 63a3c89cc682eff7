"""Dataclasses with slots that travel between releases: one may know fields that another does not.

Their pickled state is the values in the order of the fields. New fields therefore come last and
have a default; a release before passes over what it does not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any


def set_state_or_defaults(one: Any, state: Sequence[Any]) -> None:
    """Be the `__setstate__` of a dataclass: fields that `state` lacks get their defaults."""
    for field in fields(one):
        if field.default is not MISSING:
            object.__setattr__(one, field.name, field.default)
    for field, value in zip(fields(one), state, strict=False):
        object.__setattr__(one, field.name, value)
