"""The tables of settings in docs/configuration.md, made from the classes that validate them.

python -m serve_app.settings_reference docs/configuration.md    writes them anew (`make docs`)

A mark in the page names the class: what stands below it, up to the next end mark, is made.
"""

from __future__ import annotations

import enum
import importlib
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from serve_app.errors import CompAIError

END = "<!-- End of the table. -->"
_PLACE = re.compile(rf"(<!-- Settings of ([\w.]+):(\w+), by `make docs`\. -->\n).*?({END})", re.S)
_HEAD = ("| name | type | default | allowed | what it is |", "| --- | --- | --- | --- | --- |")
# The last word of a name, or the one before `_per_`, is its unit.
_UNITS = {
    "s": "seconds",
    "bytes": "bytes",
    "tokens": "tokens",
    "days": "days",
    "months": "months",
    "cpus": "CPUs",
}
_FORMATS = {"path": "path", "uri": "URL", "password": "secret"}

Schema = Mapping[str, Any]


def renewed(page: str) -> str:
    """Return `page` with the tables of now between its marks.

    Raises:
        CompAIError: the page has no mark at all.
    """
    made, count = _PLACE.subn(_filled, page)
    if not count:
        raise CompAIError("the page has no mark of a table of settings")
    return made


def _filled(place: re.Match[str]) -> str:
    kind: type[BaseModel] = getattr(importlib.import_module(place[2]), place[3])
    return f"{place[1]}{table(kind)}\n{place[4]}"


def table(kind: type[BaseModel]) -> str:
    """Return the settings of a class as a table in Markdown."""
    schema = kind.model_json_schema(by_alias=True)
    return "\n".join((*_HEAD, *_rows(kind, schema["properties"], schema.get("$defs", {}))))


def _rows(kind: type[BaseModel], fields: Schema, kinds: Schema) -> Iterator[str]:
    for attribute, field in kind.model_fields.items():
        name = field.alias or attribute
        schema = _one(fields[name], kinds)
        cells = (
            f"`{name}`",
            _type(schema, kinds) + _unit(attribute, schema),
            shown(field),
            _allowed(schema, kinds),
            str(field.description),
        )
        yield "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _one(schema: Schema, kinds: Schema) -> Schema:
    """Return what a schema says of a value that is set, references to enums resolved."""
    for choice in schema.get("anyOf", ()):
        if choice.get("type") != "null":
            return _one(choice, kinds)
    name = _referred(schema)
    return kinds[name] if "enum" in kinds.get(name, {}) else schema


def _referred(schema: Schema) -> str:
    return str(schema.get("$ref", "")).rpartition("/")[2]


def _type(schema: Schema, kinds: Schema) -> str:
    schema = _one(schema, kinds)
    if name := _referred(schema):
        return f"[{name}](#{name.lower()})"
    if schema["type"] == "array":
        return f"list of {_type(schema['items'], kinds)}"
    if schema["type"] == "object":
        values = _values(schema)
        return f"map to {_type(values, kinds)}" if values else "map"
    return _FORMATS.get(schema.get("format", ""), str(schema["type"]))


def _values(schema: Schema) -> Schema | None:
    """Return what a mapping says of its values, or None where they may be anything."""
    for values in (
        schema.get("additionalProperties"),
        *schema.get("patternProperties", {}).values(),
    ):
        if isinstance(values, dict):
            return values
    return None


def _unit(attribute: str, schema: Schema) -> str:
    if schema.get("type") not in ("integer", "number"):
        return ""
    unit = _UNITS.get(attribute.partition("_per_")[0].rpartition("_")[2])
    return f", {unit}" if unit else ""


def _allowed(schema: Schema, kinds: Schema) -> str:
    schema = _one(schema, kinds)
    if schema.get("type") == "array":
        return _allowed(schema["items"], kinds)
    if schema.get("type") == "object" and (values := _values(schema)):
        return _allowed(values, kinds)
    if choices := schema.get("enum"):
        return ", ".join(f"`{choice}`" for choice in choices)
    bounds = [
        _range(schema),
        _length(schema),
        f"`{schema['pattern']}`" if "pattern" in schema else "",
    ]
    return ", ".join(bound for bound in bounds if bound)


def _range(schema: Schema) -> str:
    least, most = schema.get("minimum"), schema.get("maximum")
    above = schema.get("exclusiveMinimum")
    if least is not None and most is not None:
        return f"{_number(least)} to {_number(most)}"
    words = ("above", above), ("from", least), ("up to", most)
    return " ".join(f"{word} {_number(bound)}" for word, bound in words if bound is not None)


def _length(schema: Schema) -> str:
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    if most is not None:
        return f"{least} to {most} characters"
    # Of one character: that it is not empty, which goes without saying.
    return f"{least} characters or more" if least > 1 else ""


def shown(field: FieldInfo) -> str:
    """Return the default of a setting as the tables write it."""
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return "required"
    if default is None:
        return "not set"
    if isinstance(default, BaseModel):
        named = default.model_dump(exclude_unset=True)
        return ", ".join(f"{name} {_number(value)}" for name, value in named.items()) or "empty"
    if default in ((), {}):
        return "empty"
    return f"`{_plain(default)}`"


def _plain(default: object) -> str:
    if isinstance(default, enum.Enum):
        return str(default.value)
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, int | float):
        return _number(default)
    return ", ".join(default) if isinstance(default, tuple) else str(default)


def _number(value: float) -> str:
    """Return a number without an exponent, nor a fraction of nothing."""
    return str(int(value)) if value == int(value) else str(value)


def main(path: Path) -> None:
    """Write the tables into the page at `path`. Raises CompAIError as `renewed` does."""
    path.write_text(renewed(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
