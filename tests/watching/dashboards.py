"""The questions of the dashboards, and which of them the running stack cannot answer."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tests.watching.prometheus import MONITORING, Watch

# Counted from their first event on, which only trouble, a month's end or a setting brings.
UNANSWERED_WITHOUT_TROUBLE = {
    "ray_comp_ai_log_dropped_total": "no record was dropped",
    "ray_comp_ai_bodies_not_redacted_total": "redacting did not fail",
    "ray_comp_ai_upkeep_failures_total": "no task of the upkeep failed",
    "ray_comp_ai_retention_rows_total": "nothing was past its time",
    "ray_comp_ai_retention_partitions_dropped_total": "no month was past its time",
    "ray_comp_ai_queue_refused_total": "no queue was full",
    "ray_comp_ai_tracing_spans_total": "tracing is off",
}


@dataclass(frozen=True)
class Question:
    """One query of one panel."""

    dashboard: str
    panel: str
    query: str

    def answered(self, watch: Watch) -> bool:
        """Tell whether a series with a number answers."""
        found = watch.ask(self.query)
        return any(not math.isnan(float(one["value"][1])) for one in found)

    @property
    def excuse(self) -> str | None:
        """Why it may stay unanswered where there was no trouble; None where it may not."""
        for name, why in UNANSWERED_WITHOUT_TROUBLE.items():
            if name in self.query:
                return why
        return None


def without_data(asked: Iterable[Question], watch: Watch, timeout_s: float) -> list[Question]:
    """Ask until every question is answered, or for so long; return those that were not."""
    deadline = time.monotonic() + timeout_s
    left = [*asked]
    while left and time.monotonic() < deadline:
        left = [one for one in left if not one.answered(watch)]
        time.sleep(0.5)
    return left


def questions() -> Iterator[Question]:
    """Return what all dashboards ask Prometheus, with Grafana's words filled in."""
    for file in sorted((MONITORING / "grafana" / "dashboards").glob("*.json")):
        board = json.loads(file.read_text(encoding="utf-8"))
        for panel in board["panels"]:
            for target in panel.get("targets", ()):
                if target["datasource"]["uid"] == "prometheus":
                    query = target["expr"].replace("$__rate_interval", "5m")
                    yield Question(file.stem, panel["title"], query.replace('"$model"', '".*"'))
