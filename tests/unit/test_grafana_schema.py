"""The dashboards have the shape that Grafana's own types give: no other names, right values."""

from __future__ import annotations

import enum
import json
import operator
import typing
from collections.abc import Iterator
from functools import cache, reduce
from pathlib import Path
from typing import Any, Literal, Union

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from pydantic import ConfigDict, TypeAdapter, ValidationError

FOLDER = Path(__file__).parents[2] / "monitoring" / "grafana" / "dashboards"
DASHBOARDS = sorted(FOLDER.glob("*.json"))
# What Grafana writes and reads, and its types lack: the text that the list of variables shows.
UNTYPED = {"definition"}


@pytest.fixture(scope="module", autouse=True)
def _plugins() -> None:
    """Let the types of panels and queries be known."""
    register_default_plugins()


def read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def lost(given: Any, kept: Any, path: str = "") -> Iterator[str]:
    """Return where `kept`, which went through Grafana's types, is not what was given."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for name in given.keys() - UNTYPED:
            if name not in kept:
                yield f"{path}.{name} is not known"
            else:
                yield from lost(given[name], kept[name], f"{path}.{name}")
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for number, pair in enumerate(zip(given, kept, strict=True)):
            yield from lost(*pair, f"{path}[{number}]")
    elif given != kept:
        yield f"{path}: {given!r} became {kept!r}"


def plain(hint: Any) -> Any:
    """Return a type whose enumerations are their values, as they stand in JSON."""
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return Literal[tuple(member.value for member in hint)]
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Union:
        return reduce(operator.or_, (plain(one) for one in inner))
    if origin in (list, dict):
        return origin[tuple(plain(one) for one in inner)]
    return hint


@cache
def hints(of: Any) -> dict[str, TypeAdapter[Any]]:
    """Return what checks each field of one of Grafana's types."""
    config = ConfigDict(arbitrary_types_allowed=True)
    return {
        name: TypeAdapter(plain(hint), config=config)
        for name, hint in typing.get_type_hints(of).items()
    }


def wrong(found: Any, path: str = "") -> Iterator[str]:
    """Return what is of another type than Grafana's types say, in `found` and below it."""
    if isinstance(found, list):
        for number, one in enumerate(found):
            yield from wrong(one, f"{path}[{number}]")
    elif type(found).__module__.startswith("grafana_foundation_sdk.models"):
        if isinstance(found, enum.Enum):
            return
        for name, adapter in hints(found.__class__).items():
            value = getattr(found, name)
            try:
                adapter.validate_python(value, strict=True)
            except ValidationError as error:
                yield f"{path}.{name}: {error.errors()[0]['msg']}"
            yield from wrong(value, f"{path}.{name}")


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_the_dashboard_is_one_of_grafanas(file: Path) -> None:
    given = read(file)
    taken = Dashboard.from_json(given)
    assert [*lost(given, json.loads(JSONEncoder().encode(taken)))] == []
    assert [*wrong(taken)] == []


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("tagz",), ["a"], "tagz is not known"),
        (("panels", 0, "gridPoz"), {}, "gridPoz is not known"),
        (("panels", 0, "gridPos", "w"), "twelve", "w: Input should be a valid integer"),
        (("panels", 0, "fieldConfig", "defaults", "unitt"), "s", "unitt is not known"),
        (("editable",), "yes", "editable: Input should be a valid boolean"),
    ],
)
def test_what_is_wrong_is_found(path: tuple[str | int, ...], value: object, said: str) -> None:
    given = read(FOLDER / "accounts.json")
    place: Any = given
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    taken = Dashboard.from_json(given)
    found = [*lost(given, json.loads(JSONEncoder().encode(taken))), *wrong(taken)]
    assert any(said in line for line in found), found
