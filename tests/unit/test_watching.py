"""The rules with shorter time, and the answers of the small servers of the watched stack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.watching.receiver import Page, Receiver
from tests.watching.scaled import scaled_query, scaled_rules, scaled_time

RULES = sorted((Path(__file__).parents[2] / "monitoring" / "prometheus" / "rules").glob("*.yml"))


@pytest.mark.parametrize(
    ("time", "shorter"), [("5m", "10000ms"), ("1h", "120000ms"), ("3d", "8640000ms")]
)
def test_a_time_is_divided(time: str, shorter: str) -> None:
    assert scaled_time(time, 30) == shorter


def test_ranges_and_offsets_are_divided_and_nothing_else_is() -> None:
    query = 'sum(rate(x_rate5m{a="5m"}[10m])) > 300 or y offset 1h'
    shorter = 'sum(rate(x_rate5m{a="5m"}[60000ms])) > 300 or y offset 360000ms'
    assert scaled_query(query, 10) == shorter


def _rules(file: Path) -> list[dict[str, Any]]:
    return [
        rule
        for group in yaml.safe_load(file.read_text("utf-8"))["groups"]
        for rule in group["rules"]
    ]


@pytest.mark.parametrize("file", RULES, ids=lambda file: file.stem)
def test_the_shorter_rules_are_the_same_but_for_their_time(file: Path) -> None:
    shorter = scaled_rules(yaml.safe_load(file.read_text("utf-8")))
    found = [rule for group in shorter["groups"] for rule in group["rules"]]
    for rule, short in zip(_rules(file), found, strict=True):
        assert {**rule, "expr": "", "for": ""} == {**short, "expr": "", "for": ""}
        assert ("for" in rule) == ("for" in short)
        assert rule.get("for") != short.get("for") or "for" not in rule


def test_a_page_is_told_and_a_notification_is_taken() -> None:
    with Page("up_here 1\n") as page, Receiver() as receiver:
        assert httpx.get(f"http://127.0.0.1:{page.port}/metrics").text == "up_here 1\n"
        alert = {"labels": {"alertname": "A"}, "status": "firing"}
        httpx.post(f"{receiver.url}/pages", json={"alerts": [alert]})
        assert receiver.seen == {("pages", "A", "firing")}
