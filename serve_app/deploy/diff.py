"""A plan for people: what changes, as YAML with - and + before its lines."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from serve_app.deploy.config import Application
from serve_app.deploy.plan import ApplicationChange, Effect, Plan

_CONTEXT_LINES = 2
_HIDDEN = "(hidden)"


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as such, so that a diff of them can be read."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def told(plan: Plan) -> Iterator[str]:
    """Yield the lines that say what `plan` does."""
    for app in plan.applications:
        yield f"{app.name}: {app.effect}"
        yield from (f"  {one.told}" for one in app.deployments if one.effect is not Effect.SAME)
        yield from (f"    {line}" for line in _diff(app))
    for option in plan.not_now:
        yield f"{option}: taken over when Ray starts the next time, not now"


def _diff(app: ApplicationChange) -> Iterator[str]:
    if app.effect is Effect.SAME:
        return
    lines = difflib.unified_diff(
        _lines(app.before), _lines(app.after), lineterm="", n=_CONTEXT_LINES
    )
    # Without the names of two files that are none.
    yield from list(lines)[2:]


def _lines(app: Application | None) -> list[str]:
    if app is None:
        return []
    return yaml.dump(
        _without_secrets(app), Dumper=_Dumper, sort_keys=False, width=1000, allow_unicode=True
    ).splitlines()


def _without_secrets(value: Any, name: str = "") -> Any:
    """Return `value` without what an environment holds: keys are there at times."""
    if isinstance(value, Mapping):
        if name == "env_vars":
            return dict.fromkeys(value, _HIDDEN)
        return {key: _without_secrets(one, key) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_secrets(one) for one in value]
    return value
