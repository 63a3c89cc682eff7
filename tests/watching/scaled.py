"""The project's own rules, with their time made shorter: 5 minutes become 10 seconds.

Whatever is a time of Prometheus is divided by the factor: `for`, the range of a selector, an
`offset` and the interval of a group. Thresholds stay as they are, those in seconds too, but for
the two below whose cause would take a quarter of an hour to come about.
"""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

FACTOR = 30
# A task of the upkeep is tried every 10 s at best: more than 3 failures need a longer window.
_SLOWER = {"CompAIUpkeepFails": 10}
_THRESHOLDS = {"CompAIUpkeepLate": ("> 900", "> 120")}

_UNITS_MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}
_TIME = r"(\d+)(ms|[smhdw])"
_IN_QUERY = re.compile(rf"(?<=\[){_TIME}(?=\])|(?<=\boffset ){_TIME}\b")


def scaled_time(time: str, factor: float) -> str:
    """Return a time of Prometheus, as `5m`, divided by `factor`."""
    found = re.fullmatch(_TIME, time)
    if found is None:
        raise ValueError(f"no time of Prometheus: {time}")
    return f"{round(int(found[1]) * _UNITS_MS[found[2]] / factor)}ms"


def scaled_query(query: str, factor: float) -> str:
    """Return `query` with the ranges and offsets divided by `factor`."""
    return _IN_QUERY.sub(lambda found: scaled_time(found[0], factor), query)


def scaled_rules(rules: dict[str, Any], factor: float = FACTOR) -> dict[str, Any]:
    """Return a file of rules whose time is shorter by `factor`."""
    rules = deepcopy(rules)
    for group in rules["groups"]:
        if "interval" in group:
            group["interval"] = scaled_time(group["interval"], factor)
        for rule in group["rules"]:
            _scale(rule, factor)
    return rules


def _scale(rule: dict[str, Any], factor: float) -> None:
    name = rule.get("alert", "")
    factor = min(factor, _SLOWER.get(name, factor))
    rule["expr"] = scaled_query(rule["expr"], factor)
    if name in _THRESHOLDS:
        rule["expr"] = rule["expr"].replace(*_THRESHOLDS[name])
    if "for" in rule:
        rule["for"] = scaled_time(rule["for"], factor)


def write_scaled(source: Path, target: Path, factor: float = FACTOR) -> None:
    """Write every file of rules of `source` into `target`, with shorter time."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.glob("*.yml")):
        rules = yaml.safe_load(file.read_text(encoding="utf-8"))
        (target / file.name).write_text(yaml.safe_dump(scaled_rules(rules, factor)))
