"""What a system costs: CPU seconds and resident bytes of its processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil

from tests.stack_runner import descendants

# By a part of the command line; the first that is found. A raylet's holds those of its workers.
_PARTS = {
    "raylet": "/raylet/raylet ",
    "GCS": "/gcs/gcs_server ",
    "Ray's agent": "ray::DashboardAgent",
    "ProxyActor": "ray::ProxyActor",
    "HAProxyManager": "ray::HAProxyManager",
    "ServeController": "ray::ServeController",
    "HAProxy": "/haproxy ",
    "nginx": "nginx",
    "postgres": "postgres",
    "litellm": "litellm",
}
# The processes of a system without those of its engine, now.
Processes = Callable[[], list[psutil.Process]]


@dataclass
class Spent:
    """CPU seconds, by the name of the part that spent them; filled in at the end."""

    cpu_s: dict[str, float] = field(default_factory=dict)

    @property
    def total_s(self) -> float:
        """CPU seconds of all parts."""
        return sum(self.cpu_s.values())


@contextmanager
def spending(processes: Processes) -> Iterator[Spent]:
    """Count the CPU seconds that the processes spend while the block runs.

    Those of a process that ends meanwhile are not counted; nothing of a system that is measured
    should end.
    """
    spent = Spent()
    before = {process: _cpu_s(process) for process in processes()}
    yield spent
    for process in processes():
        part = part_of(process)
        used_s = _cpu_s(process) - before.get(process, 0.0)
        spent.cpu_s[part] = spent.cpu_s.get(part, 0.0) + used_s


def resident_bytes(processes: Processes) -> dict[str, int]:
    """Return the proportional set size by part: pages that several share count once in all."""
    sizes: dict[str, int] = {}
    for process in processes():
        with contextlib.suppress(psutil.Error):
            size = process.memory_full_info().pss
            sizes[part_of(process)] = sizes.get(part_of(process), 0) + size
    return sizes


def part_of(process: psutil.Process) -> str:
    """Return a short name of what a process does: `nginx`, `Gateway`, `postgres` …"""
    try:
        title = " ".join(process.cmdline())
    except psutil.Error:
        return "ended"
    if title.startswith("ray::ServeReplica:"):
        return title.split()[0].rpartition(":")[2]
    for part, name in _PARTS.items():
        if name in title:
            return part
    return "Ray" if "ray" in title else "other"


def below(pid: int) -> list[psutil.Process]:
    """Return a process and all its descendants."""
    try:
        return [psutil.Process(pid), *descendants(pid)]
    except psutil.NoSuchProcess:
        return []


def _cpu_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)
