"""The processes of a stack that may be killed."""

from __future__ import annotations

import random
from collections.abc import Callable

import psutil

from tests.serve_configs import FAKE_MODEL
from tests.stack_runner import RunningStack


def _replica(deployment: str) -> Callable[[RunningStack], list[int]]:
    return lambda stack: [process.pid for process in stack.replicas(deployment)]


def _process(title: str) -> Callable[[RunningStack], list[int]]:
    return lambda stack: [process.pid for process in stack.processes(title)]


def _door(stack: RunningStack) -> list[int]:
    """Return Serve's own proxy and, where it is on, HAProxy with what keeps it."""
    titles = ("ray::ProxyActor", "ray::HAProxyManager", "/haproxy.cfg")
    return [process.pid for title in titles for process in stack.processes(title)]


def _postgres(stack: RunningStack) -> list[int]:
    pid = stack.postgres.running_pid()
    return [] if pid is None else [pid]


VICTIMS: dict[str, Callable[[RunningStack], list[int]]] = {
    "gateway": _replica("Gateway"),
    "request log": _replica("RequestLog"),
    "PostgreSQL": _postgres,
    "limits": _replica("Limits"),
    "model": _replica(f"Model:{FAKE_MODEL}"),
    "nginx": _process("nginx: master"),
    "proxy": _door,
    "controller": _process("ray::ServeController"),
}


def kill_one(stack: RunningStack, victim: str, rng: random.Random) -> bool:
    """Kill one process of the kind `victim` with SIGKILL; False where none runs just now."""
    found = VICTIMS[victim](stack)
    if not found:
        return False
    try:
        psutil.Process(rng.choice(found)).kill()
    except psutil.NoSuchProcess:
        return False
    return True
