"""Alerts and dashboards name metrics, labels and pages that exist, and each alert has its test."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

PROJECT = Path(__file__).parents[2]
FOLDER = PROJECT / "monitoring"
RULES = sorted((FOLDER / "prometheus" / "rules").glob("*.yml"))
CASES = sorted((FOLDER / "prometheus" / "tests").glob("*.yml"))
DASHBOARDS = sorted((FOLDER / "grafana" / "dashboards").glob("*.json"))
LOKI_RULES = sorted((FOLDER / "loki" / "rules").glob("*/*.yml"))

# What the exporters of compose.monitoring.yaml tell, and Prometheus itself.
OTHERS = {
    "up",
    "nginx_up nginx_http_requests_total nginx_connections_active nginx_connections_waiting",
    "pg_up pg_stat_activity_count pg_settings_max_connections pg_database_size_bytes",
    "pg_stat_database_xact_commit",
    "node_filesystem_avail_bytes node_filesystem_size_bytes node_cpu_seconds_total",
    "node_memory_MemAvailable_bytes node_memory_MemTotal_bytes",
    "probe_success probe_ssl_earliest_cert_expiry",
    "DCGM_FI_DEV_FB_USED DCGM_FI_DEV_FB_FREE DCGM_FI_DEV_GPU_UTIL DCGM_FI_DEV_GPU_TEMP",
}
THEIR_METRICS = set(" ".join(OTHERS).split())
# What Ray and Serve put on the metrics of ours, and Prometheus on all.
ADDED = {"application", "deployment", "replica", "instance", "job", "le"}


def page_id(path: Path) -> str:
    return path.stem


# What the code declares.


@dataclass(frozen=True)
class Metric:
    kind: str
    labels: frozenset[str]


@cache
def declared() -> dict[str, Metric]:
    """Return our metrics by the names under which Prometheus sees them."""
    found = {}
    for file in (PROJECT / "deployments").glob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        constants = {
            node.targets[0].id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
                kind = call.func.id.removeprefix("Kept")
                name = call.args[0].value if call.args and _is_text(call.args[0]) else ""
                if kind in ("Counter", "Gauge", "Histogram") and name.startswith("comp_ai_"):
                    labels = frozenset(_labels(call.args[2:], constants))
                    for shown in _shown(kind, f"ray_{name}"):
                        found[shown] = Metric(kind, labels)
    return found


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _shown(kind: str, name: str) -> list[str]:
    if kind == "Histogram":
        return [f"{name}_bucket", f"{name}_sum", f"{name}_count"]
    return [f"{name}_total" if kind == "Counter" else name]


def _labels(nodes: list[ast.expr], constants: dict[str, ast.expr]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.Tuple):
            yield from _labels(node.elts, constants)
        elif isinstance(node, ast.Starred):
            yield from _labels([node.value], constants)
        elif isinstance(node, ast.Name) and isinstance(constants.get(node.id), ast.Tuple):
            yield from _labels([constants[node.id]], constants)


@cache
def told_by_serve(name: str) -> bool:
    """Tell whether Ray Serve's source has a metric that comes out as `name`."""
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent / "serve" / "_private"
    ours = f'"{name.removeprefix("ray_")}"'
    return any(ours in file.read_text(encoding="utf-8") for file in source.glob("*.py"))


# What rules and dashboards ask for.


def rules() -> list[dict[str, Any]]:
    return [
        rule
        for file in RULES
        for group in yaml.safe_load(file.read_text(encoding="utf-8"))["groups"]
        for rule in group["rules"]
    ]


def loki_rules() -> list[dict[str, Any]]:
    return [
        rule
        for file in LOKI_RULES
        for group in yaml.safe_load(file.read_text(encoding="utf-8"))["groups"]
        for rule in group["rules"]
    ]


def alerts() -> list[dict[str, Any]]:
    return [rule for rule in [*rules(), *loki_rules()] if "alert" in rule]


def dashboard(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def panels(file: Path) -> list[dict[str, Any]]:
    return [panel for panel in dashboard(file)["panels"] if panel["type"] != "row"]


def prometheus_queries() -> list[str]:
    """Return every query of the dashboards, with Grafana's own words filled in."""
    found = []
    for file in DASHBOARDS:
        for panel in panels(file):
            for target in panel["targets"]:
                if target["datasource"]["uid"] == "prometheus":
                    found.append(target["expr"])
    return [query.replace("$__rate_interval", "5m").replace('"$model"', '".*"') for query in found]


_SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)\s*\{([^}]*)\}")
_GROUPING = re.compile(r"\b(by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_WORDS = {"and", "or", "unless", "offset", "bool", "by", "without", "on", "ignoring"}


def metrics_of(query: str) -> set[str]:
    """Return the names of the metrics of a query."""
    bare = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]', "", re.sub(r"\{[^}]*\}", "", query))
    bare = re.sub(r"\boffset\s+\w+", "", _GROUPING.sub("", bare))
    names = re.findall(r"(?<![\w.])([a-zA-Z_:][\w:]*)\b(?!\s*\()", bare)
    return set(names) - _WORDS


QUERIES = [rule["expr"] for rule in rules()] + prometheus_queries()
RECORDED = {rule["record"] for rule in rules() if "record" in rule}


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ('sum by (a) (rate(x_total{b="c d"}[5m])) > 0 or y offset 10m', {"x_total", "y"}),
        ("a:b:rate5m / on (c) max by (c) (d) > 14.4 * 0.005", {"a:b:rate5m", "d"}),
    ],
)
def test_the_reader_of_queries_finds_the_metrics(query: str, names: set[str]) -> None:
    assert metrics_of(query) == names


def test_the_labels_of_a_metric_are_read_from_the_code() -> None:
    assert declared()["ray_comp_ai_requests_total"].labels == {
        "route",
        "model",
        "status",
        "outcome",
    }
    assert declared()["ray_comp_ai_upkeep_failures_total"].labels == {"task"}


@pytest.mark.parametrize("query", QUERIES)
def test_every_metric_that_is_asked_for_exists(query: str) -> None:
    ours = declared()
    named = metrics_of(query)
    assert named
    for name in named - THEIR_METRICS - RECORDED - ours.keys():
        assert name.startswith("ray_serve_"), f"nobody tells {name}"
        assert told_by_serve(name), f"Ray Serve has no {name}"


@pytest.mark.parametrize("query", QUERIES)
def test_every_label_that_is_asked_for_exists(query: str) -> None:
    ours = declared()
    for name, matchers in _SELECTOR.findall(query):
        if name in ours:
            asked = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
            assert asked <= ours[name].labels | ADDED, name
    named = metrics_of(query)
    if named <= ours.keys():
        known = frozenset[str]().union(*(ours[name].labels for name in named)) | ADDED
        for _, labels in _GROUPING.findall(query):
            assert {label.strip() for label in labels.split(",") if label.strip()} <= known


def test_no_principal_is_a_label() -> None:
    for name, metric in declared().items():
        assert not {label for label in metric.labels if re.search("principal|user|key", label)}, (
            name
        )
    for file in (FOLDER / "alloy").glob("*.alloy"):
        [labels] = re.findall(r"stage\.labels \{\s*values = \{([^}]*)\}", file.read_text("utf-8"))
        assert set(re.findall(r'"(\w+)" =', labels)) == {"service", "stream", "action", "level"}


# Alerts.


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_every_alert_says_what_it_means_and_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("page", "ticket")
    said = alert["annotations"]
    assert said.keys() == {"summary", "description", "runbook_url"}
    assert all(text.endswith(".") for text in (said["summary"], said["description"]))
    assert said["runbook_url"] == f"docs/runbook.md#{alert['alert'].lower()}"


def entries() -> dict[str, str]:
    """Return what the runbook has for each alert."""
    text = (PROJECT / "docs" / "runbook.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^### (\w+)$\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL))


def test_the_runbook_has_every_alert_and_no_other() -> None:
    assert entries().keys() == {alert["alert"] for alert in alerts()}


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_the_runbook_tells_the_severity(alert: dict[str, Any]) -> None:
    assert f"**{alert['labels']['severity'].capitalize()}.**" in entries()[alert["alert"]]


def test_every_task_of_the_upkeep_is_watched() -> None:
    [late] = [alert for alert in alerts() if alert["alert"] == "CompAIUpkeepLate"]
    watched = set(re.findall(r"[a-z_]+", " ".join(re.findall(r'task=~"([^"]*)"', late["expr"]))))
    code = " ".join(file.read_text("utf-8") for file in (PROJECT / "serve_app").glob("**/*.py"))
    assert watched == set(re.findall(r'\bTask\("(\w+)",', code))


def test_every_action_that_loki_watches_is_logged() -> None:
    code = " ".join(file.read_text("utf-8") for file in (PROJECT / "serve_app").glob("**/*.py"))
    for rule in loki_rules():
        actions = re.findall(r'action="([^"]+)"', rule["expr"])
        assert actions
        for action in actions:
            assert f'"{action}"' in code


def cases() -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for file in CASES:
        for case in yaml.safe_load(file.read_text(encoding="utf-8"))["tests"]:
            found.setdefault(case["name"], []).append(case)
    return found


def test_every_alert_has_a_case_in_which_it_fires() -> None:
    alone = {rule["alert"] for rule in rules() if "alert" in rule}
    there = cases()
    assert there.keys() == alone | {"healthy"}
    for name in alone:
        for case in there[name]:
            asked = case["promql_expr_test"][-1]
            assert f'alertstate="firing", alertname="{name}"' in asked["expr"]
            assert len(asked["exp_samples"]) == 1


def test_the_healthy_case_has_every_metric_of_the_alerts() -> None:
    [healthy] = cases()["healthy"]
    there = {series["series"].split("{")[0] for series in healthy["input_series"]}
    asked = {name for rule in rules() for name in metrics_of(rule["expr"])}
    assert asked - RECORDED <= there
    for question in healthy["promql_expr_test"]:
        assert question["exp_samples"] == []


PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="no promtool: install Debian's package prometheus"
)
AMTOOL = shutil.which("amtool")


def ran(*words: str | Path, given: str | None = None) -> None:
    done = subprocess.run(words, capture_output=True, text=True, input=given)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
@pytest.mark.parametrize("file", CASES, ids=page_id)
def test_alerts_fire_when_they_should(file: Path) -> None:
    assert PROMTOOL is not None
    ran(PROMTOOL, "test", "rules", file)


@needs_promtool
def test_prometheus_takes_the_rules_and_the_queries(tmp_path: Path) -> None:
    assert PROMTOOL is not None
    ran(PROMTOOL, "check", "rules", *RULES)
    # As rules: there is no other way to have a query checked without a server.
    asked = [
        {"record": f"dashboard:query:{number}", "expr": query}
        for number, query in enumerate(prometheus_queries())
    ]
    file = tmp_path / "dashboards.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboards", "rules": asked}]}))
    ran(PROMTOOL, "check", "rules", file)


@needs_promtool
@pytest.mark.parametrize("name", ["prometheus.yml", "prometheus.local.yml"])
def test_prometheus_takes_its_configuration(name: str) -> None:
    assert PROMTOOL is not None
    ran(PROMTOOL, "check", "config", "--syntax-only", FOLDER / "prometheus" / name)


def example_with_address() -> str:
    """Return the example; a webhook's address from a file came after Debian's version."""
    text = (FOLDER / "alertmanager" / "alertmanager.example.yml").read_text(encoding="utf-8")
    return text.replace("url_file: /run/secrets/pager_url", "url: http://pager/")


@pytest.mark.skipif(AMTOOL is None, reason="no amtool: install Debian's prometheus-alertmanager")
def test_alertmanager_takes_its_configuration(tmp_path: Path) -> None:
    assert AMTOOL is not None
    ran(AMTOOL, "check-config", FOLDER / "alertmanager" / "alertmanager.yml")
    file = tmp_path / "example.yml"
    file.write_text(example_with_address())
    ran(AMTOOL, "check-config", file)


@pytest.mark.skipif(AMTOOL is None, reason="no amtool: install Debian's prometheus-alertmanager")
@pytest.mark.parametrize(("severity", "receiver"), [("page", "pages"), ("ticket", "tickets")])
def test_each_severity_goes_to_its_receiver(tmp_path: Path, severity: str, receiver: str) -> None:
    assert AMTOOL is not None
    file = tmp_path / "example.yml"
    file.write_text(example_with_address())
    labels = f"severity={severity}"
    ran(
        AMTOOL,
        "config",
        "routes",
        "test",
        f"--config.file={file}",
        labels,
        f"--verify.receivers={receiver}",
    )


def test_what_alertmanager_silences_are_alerts() -> None:
    file = FOLDER / "alertmanager" / "alertmanager.example.yml"
    names = [alert["alert"] for alert in alerts()]
    for rule in yaml.safe_load(file.read_text(encoding="utf-8"))["inhibit_rules"]:
        for matcher in [*rule["source_matchers"], *rule["target_matchers"]]:
            [pattern] = re.findall(r'alertname=~?"([^"]+)"', matcher)
            for one in pattern.split("|"):
                assert any(re.fullmatch(one, name) for name in names), one


# Dashboards.


def test_dashboards_have_ids_of_their_own() -> None:
    found = [dashboard(file) for file in DASHBOARDS]
    assert len({one["uid"] for one in found}) == len({one["title"] for one in found}) == len(found)
    assert all(one["uid"].startswith("comp-ai-") for one in found)
    assert all("id" not in one for one in found)


@pytest.mark.parametrize("file", DASHBOARDS, ids=page_id)
def test_every_panel_has_a_unit_a_source_and_a_place(file: Path) -> None:
    there = yaml.safe_load(
        (FOLDER / "grafana" / "provisioning" / "datasources" / "comp-ai.yml").read_text("utf-8")
    )
    types = {source["uid"]: source["type"] for source in there["datasources"]}
    ids = [panel["id"] for panel in dashboard(file)["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in dashboard(file)["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    for panel in panels(file):
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        for target in panel["targets"]:
            source = target["datasource"]
            assert types[source["uid"]] == source["type"], panel["title"]


def test_the_dashboard_of_the_plan_is_there() -> None:
    titles = {panel["title"] for file in DASHBOARDS for panel in panels(file)}
    assert {"Request rate", "Latency", "Error rate", "Time to first token"} <= titles
    assert {"Time between tokens", "Database write time", "Tokens by principal"} <= titles


def test_every_metric_of_ours_is_shown() -> None:
    shown = {name for query in prometheus_queries() for name in metrics_of(query)}
    for rule in rules():
        if "record" in rule and rule["record"] in shown:
            shown |= metrics_of(rule["expr"])
    wanted = {
        name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count")
        for name in declared()
    }
    assert wanted <= {name.removesuffix("_bucket") for name in shown}
