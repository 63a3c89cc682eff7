"""Looks at a stack every few seconds while it is asked, and at its rest before and after."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil

from load_tests.bench.cost import below, part_of
from load_tests.bench.scenarios import percentile
from load_tests.soak.capacity import Step
from load_tests.soak.churn import Seen
from load_tests.soak.footprint import footprint
from load_tests.soak.trend import Figures, Trend, trends
from tests.serve_configs import FAKE_MODEL
from tests.stack_runner import RunningStack

EVERY_S = 10.0
# Of the whole time: caches fill, connections open.
WARM_UP = 0.2
_MOST_FAILURES = 0.001
# What must be the same process at the end. Others come and go by nature.
LASTING = (
    "Gateway",
    "Limits",
    "RequestLog",
    "ProxyActor",
    "HAProxyManager",
    "ServeController",
    "raylet",
    "GCS",
    "Ray's agent",
    FAKE_MODEL,
    "nginx",
)
# At rest: connections to PostgreSQL are kept for five minutes, threads for as long.
_MORE = {"files": 8, "threads": 8}
_LOOK_AGAIN_S = 1.0


@dataclass(frozen=True)
class Sample:
    """What was seen at one time; `ttft_p95_ms` is of the first tokens since the sample before."""

    at_s: float
    asked: int
    failures: int
    ttft_p95_ms: float
    figures: Figures


@dataclass
class Findings:
    """Everything that one soak saw, as far as it came."""

    minutes: float
    ttft_p95_bound_ms: float
    load_before: float
    steps: list[Step] = field(default_factory=list)
    rate: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    seen: Seen = field(default_factory=Seen)
    # Of the stack when nobody asks it.
    rest_before: Figures = field(default_factory=dict)
    rest_after: Figures = field(default_factory=dict)
    leases_left: int | None = None
    replaced: list[str] = field(default_factory=list)
    # What ended the run before its time.
    broke: str | None = None

    @property
    def watched(self) -> list[Sample]:
        """The samples after the warm-up."""
        warm_s = WARM_UP * self.minutes * 60
        return [sample for sample in self.samples if sample.at_s >= warm_s]

    def trends(self) -> list[Trend]:
        """Return how every figure went after the warm-up; nothing before there are two samples."""
        watched = self.watched
        if len(watched) < 2:
            return []
        return trends([one.at_s for one in watched], [one.figures for one in watched])

    def faults(self) -> list[str]:
        """Return a sentence for everything that is not as it should be."""
        told = [f"grows: {one}" for one in self.trends() if not one.flat]
        told += [f"{part} was replaced" for part in self.replaced]
        if self.seen.failures > _MOST_FAILURES * self.seen.asked.total():
            told.append(f"{self.seen.failures} of {self.seen.asked.total()} requests failed")
        if self.rest_before and self.rest_after:
            told += [f"at rest {what}" for what in more_held(self.rest_before, self.rest_after)]
        if self.leases_left:
            told.append(f"{self.leases_left} leases were left")
        if self.broke is not None:
            told.append(f"it ended before its time: {self.broke}")
        return told

    def raw(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        # `asdict` does not copy a Counter as it should.
        seen = {
            "asked": {**self.seen.asked},
            "failed": {**self.seen.failed},
            "held_back": self.seen.held_back,
        }
        return asdict(self) | {
            "seen": seen,
            "trends": [asdict(one) | {"flat": one.flat} for one in self.trends()],
            "faults": self.faults(),
        }


async def sample(stack: RunningStack, findings: Findings, begun_s: float) -> None:
    """Take one sample now."""
    figures = await asyncio.to_thread(footprint, stack)
    seen = findings.seen
    firsts_ms = [first_s * 1000 for first_s in seen.firsts_s]
    seen.firsts_s.clear()
    findings.samples.append(
        Sample(
            at_s=round(time.monotonic() - begun_s, 1),
            asked=seen.asked.total(),
            failures=seen.failures,
            ttft_p95_ms=round(percentile(firsts_ms, 95), 1),
            figures=figures,
        )
    )


def lasting(stack: RunningStack) -> dict[str, set[int]]:
    """Return the pids of those parts that should live as long as the stack does."""
    found: dict[str, set[int]] = {}
    for process in below(stack.process.pid):
        if (part := part_of(process)) in LASTING and not _is_worker_of_nginx(process):
            found.setdefault(part, set()).add(process.pid)
    return found


def _is_worker_of_nginx(process: psutil.Process) -> bool:
    # They are replaced where the master is told of a new certificate.
    try:
        return "nginx: worker" in " ".join(process.cmdline())
    except psutil.Error:
        return True


async def rest(stack: RunningStack, before: Figures, *, longest_s: float) -> Figures:
    """Leave the stack alone until nothing is held that was not before; return its footprint.

    Where that does not come within `longest_s` the footprint is the last that was seen.
    """
    end_s = time.monotonic() + longest_s
    while True:
        found = await asyncio.to_thread(footprint, stack)
        if not more_held(before, found) or time.monotonic() > end_s:
            return found
        await asyncio.sleep(_LOOK_AGAIN_S)


def more_held(before: Figures, now: Figures) -> list[str]:
    """Return what a stack that nobody asks holds, and did not before.

    Some files more may be open: connections that a pool keeps for minutes.
    """
    told = [
        f"{part}: {now[part][figure]:g} {figure}, {before[part][figure]:g} before"
        for part in LASTING
        for figure, more in _MORE.items()
        if part in before and part in now and now[part][figure] > before[part][figure] + more
    ]
    left = {"reservations": now["limits"]["held"], "spooled records": now["spool"]["records"]}
    return told + [f"{count:g} {what}" for what, count in left.items() if count]
