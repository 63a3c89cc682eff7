"""Writes what a soak saw: raw JSON, a page of Markdown, and a picture of memory and files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from load_tests.bench.report import machine
from load_tests.figures import can_draw, drawn
from load_tests.soak.trend import Trend, amount
from load_tests.soak.watching import WARM_UP, Findings

_MIB = 2**20
_SHORT_MINUTES = 30
# Drawn are the parts that hold most.
_DRAWN = 8


def write(findings: Findings, folder: Path, *, picture: bool) -> str:
    """Write `soak.json` and `soak.md`, and `soak.svg` where `picture`; return the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = findings.raw() | {"machine": machine()}
    (folder / "soak.json").write_text(json.dumps(raw, indent=1) + "\n")
    drawing = picture and can_draw() and bool(findings.samples)
    if drawing:
        draw(findings, folder / "soak.svg")
    page = markdown(findings, drawing=drawing)
    (folder / "soak.md").write_text(page)
    return page


def markdown(findings: Findings, *, drawing: bool) -> str:
    """Return the page."""
    faults = findings.faults()
    parts = [
        "# Soak",
        "",
        f"{machine()}; load before: {findings.load_before:.1f}. A whole stack, the fake model, "
        f"one gateway; asked for {findings.minutes:g} minutes at {findings.rate:.1f} requests a "
        "second, 70 % of the highest rate that was kept, at random moments. Clients on the same "
        "machine.",
        "",
        "**Flat.**" if not faults else "**Not flat:**",
        *(f"- {fault}" for fault in faults),
    ]
    if findings.minutes < _SHORT_MINUTES:
        parts += [
            "",
            "So short a run shows that the soak works, no more: growth in minutes is taken for "
            "that of an hour.",
        ]
    if drawing:
        parts += ["", "![Memory, files and first tokens over the time](soak.svg)"]
    parts += _rate_table(findings) + _trend_table(findings.trends()) + _traffic(findings)
    return "\n".join(parts) + "\n"


def _rate_table(findings: Findings) -> list[str]:
    return [
        "",
        "## The rate",
        "",
        f"Stepped up until p95 of the time to first token is over {findings.ttft_p95_bound_ms:g} "
        "ms or a request fails; then down, a minute each, until that is kept.",
        "",
        "| requests a second | asked | failed | TTFT p95, ms | kept |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {step.a_second:.1f} | {step.asked} | {step.failures} | {step.ttft_p95_ms:.0f} "
            f"| {'yes' if step.kept else 'no'} |"
            for step in findings.steps
        ),
    ]


def _trend_table(found: Sequence[Trend]) -> list[str]:
    return [
        "",
        "## What is held",
        "",
        f"After the first {WARM_UP:.0%} of the time: medians of the first and of the last tenth, "
        "Theil-Sen slope an hour, the lower end of its interval of 95 %, and the most that counts "
        "as flat; so does what may be chance. Memory is resident and not shared.",
        "",
        "| part | what | first | last | an hour | at least | bound | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(_trend_row(one) for one in sorted(found, key=lambda one: (one.figure, one.part))),
    ]


def _trend_row(one: Trend) -> str:
    figures = (one.first, one.last, one.slope_an_hour, one.least_an_hour, one.bound_an_hour)
    told = " | ".join(amount(one.figure, value) for value in figures)
    what = one.figure.removesuffix("_bytes")
    return f"| {one.part} | {what} | {told} | {'flat' if one.flat else '**grows**'} |"


def _traffic(findings: Findings) -> list[str]:
    seen = findings.seen
    asked = ", ".join(f"{count} {way}" for way, count in seen.asked.most_common())
    failed = ", ".join(f"{count} of {why}" for why, count in seen.failed.most_common()) or "none"
    lines = ["", "## Traffic", "", f"{seen.asked.total()} requests: {asked}. Failed: {failed}."]
    if seen.held_back:
        lines.append(f"Not asked, as too many were under way: {seen.held_back}.")
    return lines


def draw(findings: Findings, path: Path) -> None:
    """Draw memory and files of the largest parts, and the first tokens, over the minutes."""
    minutes = [sample.at_s / 60 for sample in findings.samples]
    with drawn(path, 3, size=(8, 9), heights=(1.6, 1.4, 1)) as axes:
        _draw_parts(axes[0], findings, minutes, "memory_bytes", _MIB)
        axes[0].set(ylabel="resident, not shared, MiB", ylim=(0, None))
        _draw_parts(axes[1], findings, minutes, "files", 1)
        axes[1].set(ylabel="open files", ylim=(0, None))
        axes[2].plot(minutes, [sample.ttft_p95_ms for sample in findings.samples], linewidth=0.8)
        axes[2].set(ylabel="first token p95, ms", xlabel="minutes", ylim=(0, None))
        for one in axes:
            one.axvspan(0, WARM_UP * findings.minutes, color="#9aa7b0", alpha=0.2)
            one.grid(alpha=0.3)


def _draw_parts(
    axes: Any, findings: Findings, minutes: Sequence[float], figure: str, scale: float
) -> None:
    last = findings.samples[-1].figures
    parts = [part for part, held in last.items() if figure in held]
    nothing = float("nan")
    for part in sorted(parts, key=lambda part: -last[part][figure])[:_DRAWN]:
        values = [
            sample.figures.get(part, {}).get(figure, nothing) / scale for sample in findings.samples
        ]
        axes.plot(minutes, values, label=part, linewidth=1)
    if parts:
        axes.legend(fontsize=7, ncols=2)
