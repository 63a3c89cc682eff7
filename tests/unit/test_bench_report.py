"""The page of the comparison: targets, and what a run says of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from load_tests.bench import report
from load_tests.bench.report import Findings
from load_tests.bench.scenarios import Held, Latency, Throughput
from load_tests.bench.targets import STREAMING, WHOLE, Row, rows
from load_tests.figures import can_draw


def latency(system: str, **other: Any) -> Latency:
    figures = {
        "ttft_p50_ms": 24.0,
        "ttft_p99_ms": 29.0,
        "itl_p50_ms": 10.05,
        "itl_p99_ms": 12.0,
        "added_ttft_p50_ms": 2.9,
        "added_ttft_p99_ms": 9.0,
        "added_itl_p50_ms": 0.05,
        "stages_p50_ms": {"auth": 0.2, "limits": 1.2, "queue": 1.0},
    }
    return Latency(system=system, **{**figures, **other})


def throughput(system: str, tokens_a_second: float, cpu_s: float) -> Throughput:
    return Throughput(
        system=system,
        clients=16,
        answers=100,
        took_s=2.0,
        ttft_p50_ms=1.0,
        ttft_p99_ms=2.0,
        itl_p50_ms=1.0,
        itl_p99_ms=2.0,
        tokens_a_second=tokens_a_second,
        answers_a_second=50.0,
        cpu_s={"Gateway": cpu_s} if cpu_s else {},
        clients_cpu_s=0.1,
    )


def held(
    streams: int,
    *,
    stalled: int = 0,
    open_at_once: int | None = None,
    gateway_bytes: int = 78_000_000,
) -> Held:
    return Held(
        system="Comp AI",
        streams=streams,
        open_at_once=streams if open_at_once is None else open_at_once,
        completed=streams,
        stalled=stalled,
        longest_gap_s=2.5,
        idle_bytes={"Gateway": 190_000_000, "nginx": 5_000_000},
        full_bytes={"Gateway": 190_000_000 + gateway_bytes, "nginx": 9_000_000},
    )


@pytest.fixture
def findings() -> Findings:
    found = Findings(engine="fake", load_before=0.2)
    found.latencies = [latency("bare engine"), latency("Comp AI")]
    found.throughputs[STREAMING] = [
        throughput("bare engine", 1000, 0),
        throughput("Comp AI", 970, 1.0),
    ]
    found.throughputs[WHOLE] = [
        throughput("bare engine", 1000, 0),
        throughput("Comp AI", 900, 0.5),
        throughput("LiteLLM", 200, 2.5),
    ]
    found.held = [held(2000)]
    return found


def by_target(found: Findings) -> Iterator[Row]:
    yield from rows(found.engine, found.latencies, found.throughputs, found.held)


def row(found: Findings, start: str) -> Row:
    [one] = [one for one in by_target(found) if one.what.startswith(start)]
    return one


def test_every_target_of_the_issue_has_a_row(findings: Findings) -> None:
    assert len(list(by_target(findings))) == 9
    assert len(list(by_target(Findings(engine="fake", load_before=0)))) == 9


def test_reached(findings: Findings) -> None:
    reached = {one.what.split(",")[0]: one.reached for one in by_target(findings)}
    assert [*reached.values()].count(False) == 0
    assert row(findings, "requests a second").seen == "5.0 times (200 and 40)"
    assert row(findings, "added time").reached
    assert row(findings, "memory of the gateway, a stream").seen == "39 KB"


def test_throughput_over_bare_is_that_of_the_real_engine(findings: Findings) -> None:
    assert row(findings, "throughput").reached is None
    findings.engine = "real"
    assert row(findings, "throughput").seen == "0.97"
    assert row(findings, "throughput").reached


@pytest.mark.parametrize(
    ("field", "value", "start"),
    [
        ("added_ttft_p50_ms", 3.1, "added time"),
        ("added_ttft_p99_ms", 10.1, "added time"),
        ("added_itl_p50_ms", 0.11, "added inter"),
        ("stages_p50_ms", {"auth": 1.0, "limits": 1.1}, "authenticate"),
    ],
)
def test_latency_that_is_too_high(findings: Findings, field: str, value: Any, start: str) -> None:
    findings.latencies[1] = latency("Comp AI", **{field: value})
    assert row(findings, start).reached is False


def test_stages_are_not_claimed_while_one_is_not_told(findings: Findings) -> None:
    assert row(findings, "authenticate").reached is None


def test_fewer_streams_than_wanted_are_not_claimed(findings: Findings) -> None:
    findings.held = [held(1000)]
    assert row(findings, "concurrent").reached is None
    # Of so many that were opened one after the other.
    findings.held = [held(2000, open_at_once=1999)]
    assert row(findings, "concurrent").reached is None
    findings.held = [held(2000, stalled=1)]
    assert row(findings, "concurrent").reached is False


def test_memory_that_is_too_high(findings: Findings) -> None:
    findings.held = [held(2000, gateway_bytes=82_000_000)]
    assert row(findings, "memory of the gateway, a stream").reached is False
    # As much for fewer of them.
    findings.held = [held(2000, open_at_once=1900)]
    assert row(findings, "memory of the gateway, a stream").reached is False


def test_memory_of_streams_that_were_over_is_not_claimed(findings: Findings) -> None:
    findings.held = [held(2000, open_at_once=0)]
    assert row(findings, "memory of the gateway, a stream").reached is None
    assert "| Comp AI | 2000 | 0 | 0 |" in report.markdown(findings, None)


def test_page_has_targets_picture_and_raw_figures(findings: Findings, tmp_path: Path) -> None:
    page = report.write("bench_fake", findings, "1.2.3", tmp_path)
    assert "| added inter-token latency | p50 ≤ 0.1 ms | p50 0.05 ms | reached |" in page
    assert json.loads((tmp_path / "bench_fake.json").read_text())["litellm"] == "1.2.3"
    assert ("(bench_fake.svg)" in page) == can_draw() == (tmp_path / "bench_fake.svg").exists()


def test_page_of_a_run_that_has_measured_nothing_yet(tmp_path: Path) -> None:
    page = report.write("bench_real", Findings(engine="real", load_before=0), None, tmp_path)
    assert page.count("not measured in this run") == 9
    assert ".svg" not in page


def test_targets_are_not_for_a_gpu(findings: Findings) -> None:
    findings.engine = "gpu"
    assert "## Targets" not in report.markdown(findings, None)
