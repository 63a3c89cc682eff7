"""One variant of Comp AI on the fake model, by part: what a flag or a change does to the cost.

    .venv/bin/python -m load_tests.bench.variant
    .venv/bin/python -m load_tests.bench.variant --set RAY_SERVE_FREEZE_GC_ON_STARTUP=1

Starts a stack and asks it in three ways: one client that streams, 16 clients that stream, 64 that
do not. Prints CPU milliseconds by part, the model replica among them, and the times that a client
sees. Run it several times, the variants in turn: CPU time says more than time on a busy machine.
First it asks nothing for `--idle-s` seconds, and prints what the stack costs then.
`--profile FOLDER` keeps a flame graph of the gateway while 16 clients stream.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from load_tests.bench import scenarios
from load_tests.bench.asking import Door, Question
from load_tests.bench.cost import Spent, below, part_of, spending
from load_tests.bench.scenarios import Held, Latency, Throughput
from load_tests.bench.systems import System
from tests.serve_configs import FAKE_MODEL, add_fake, suite_config
from tests.stack_runner import running_stack

# A model for each way of asking, so that one stack serves for all.
_AT_ONCE = "at-once"
_SLOW = "slow"
_MODELS = (FAKE_MODEL, _AT_ONCE, _SLOW)
_PY_SPY = Path(sys.executable).parent / "py-spy"
_NO_BOUND = 1_000_000
_SLOW_GAP_S = 2.0
# What the last requests left to be done is over then: records written, leases given back.
_SETTLED_S = 10.0


def _config() -> dict[str, Any]:
    config = suite_config(real_model=False, gateways=1)
    add_fake(config, _AT_ONCE, replicas=1, time_per_token_s=0.0)
    add_fake(config, _SLOW, replicas=1, time_to_first_token_s=1.0, time_per_token_s=_SLOW_GAP_S)
    for app in config["applications"][1:]:
        app["deployments"][0] |= {"max_ongoing_requests": 5000, "max_queued_requests": 5000}
    gateway = config["applications"][0]["deployments"][0]
    gateway["max_ongoing_requests"] = 5000
    limits = {"requests_per_minute": _NO_BOUND, "concurrency": 5000}
    gateway["user_config"]["limits"]["default"] = limits
    return config


@contextmanager
def _running(settings: dict[str, str]) -> Iterator[System]:
    with running_stack(_config(), **settings) as stack:
        token = stack.cli("token", "--subject", "bench").strip()
        door = Door(url=stack.url, headers={"Authorization": f"Bearer {token}"})
        yield System("Comp AI", door, lambda: below(stack.process.pid))


@asynccontextmanager
async def _profiled(system: System, folder: Path | None, name: str) -> AsyncIterator[None]:
    """Keep a flame graph of the gateway in `folder` while the block runs."""
    if folder is None:
        yield
        return
    (gateway,) = [p for p in system.processes() if part_of(p) == "Gateway"]
    file = folder / f"{name}.svg"
    command = [str(_PY_SPY), "record", "--rate", "200", "--pid", str(gateway.pid)]
    spy = await asyncio.create_subprocess_exec(
        *command, "--format", "flamegraph", "--output", str(file), stderr=subprocess.DEVNULL
    )
    await asyncio.sleep(2)
    yield
    spy.send_signal(signal.SIGINT)
    await spy.wait()
    file.write_text(without_paths(file.read_text()))


def without_paths(graph: str) -> str:
    """Return a flame graph in which no folder of this machine is named."""
    graph = re.sub(r">/[^<>]*py-spy record [^<>]*<", ">py-spy record<", graph)
    graph = re.sub(r"\((/[^():]*/site-packages|/[^():]*/lib/python3\.\d+)/", "(", graph)
    return graph.replace(f"({Path.cwd()}/", "(")


async def _measure(system: System, given: argparse.Namespace) -> None:
    stream = Question(model=FAKE_MODEL, tokens=32)
    whole = Question(model=_AT_ONCE, tokens=8, stream=False)
    await scenarios.warm([system], stream)
    await scenarios.warm([system], whole)
    if given.idle_s:
        await asyncio.sleep(_SETTLED_S)
        with spending(system.processes) as spent:
            await asyncio.sleep(given.idle_s)
        print(_idle(spent, given.idle_s), flush=True)
    (alone,) = await scenarios.one_client([system], stream, rounds=given.answers // 4)
    print(_times(alone), flush=True)
    async with _profiled(system, given.profile, given.name):
        for one in await scenarios.many_clients(
            [system], stream, clients=16, answers=given.answers, rounds=given.rounds
        ):
            print(_cost(one, stream.tokens), flush=True)
    for one in await scenarios.many_clients(
        [system], whole, clients=64, answers=given.answers * 8, rounds=given.rounds
    ):
        print(_cost(one, whole.tokens), flush=True)
    if given.streams:
        await scenarios.warm([system], Question(model=_SLOW, tokens=1))
        (held,) = await scenarios.many_streams(
            [system],
            _SLOW,
            streams=given.streams,
            ramp_s=given.streams / 40,
            gap_s=_SLOW_GAP_S,
        )
        print(_memory(held), flush=True)


def _idle(spent: Spent, seconds: float) -> str:
    parts = sorted(spent.cpu_s.items(), key=lambda item: -item[1])
    each = ", ".join(f"{part} {cpu_s / seconds * 100:.1f}" for part, cpu_s in parts)
    return f"idle: {spent.total_s / seconds * 100:.1f} % of a core ({each})"


def _times(one: Latency) -> str:
    stages = ", ".join(f"{name} {ms:.2f}" for name, ms in one.stages_p50_ms.items())
    return (
        f"1 client: TTFT {one.ttft_p50_ms:.1f} / {one.ttft_p99_ms:.1f} ms, "
        f"ITL {one.itl_p50_ms:.2f} / {one.itl_p99_ms:.2f} ms; {stages}"
    )


def _cost(one: Throughput, tokens: int) -> str:
    parts = sorted(one.cpu_s.items(), key=lambda item: -item[1])
    each = ", ".join(
        f"{part} {cpu_s / one.answers * 1000:.2f}" for part, cpu_s in parts if cpu_s > 0.02
    )
    ours_s = sum(cpu_s for part, cpu_s in parts if part not in _MODELS)
    return (
        f"{one.clients} clients, {tokens} tokens: CPU ms a request without the model "
        f"{ours_s / one.answers * 1000:.2f} ({each}); {one.answers_a_second:.0f} answers/s, "
        f"TTFT {one.ttft_p50_ms:.1f} / {one.ttft_p99_ms:.1f}, "
        f"ITL {one.itl_p50_ms:.2f} / {one.itl_p99_ms:.2f} ms"
    )


def _memory(held: Held) -> str:
    added = sorted(held.bytes_a_stream.items(), key=lambda item: -item[1])
    each = ", ".join(f"{part} {more / 1024:.0f}" for part, more in added if more > 1024)
    return (
        f"{held.streams} streams: {held.completed} completed, {held.open_at_once} open at once, "
        f"{held.stalled} stalled, longest gap {held.longest_gap_s:.1f} s; "
        f"KiB a stream {sum(more for _, more in added) / 1024:.0f} ({each}); "
        f"gateway idle {held.idle_bytes['Gateway'] / 2**20:.0f} MiB"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--name", default="gateway")
    parser.add_argument("--answers", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--streams", type=int, default=0, help="slow streams to hold, for memory")
    parser.add_argument("--idle-s", type=float, default=60.0)
    parser.add_argument("--profile", type=Path, metavar="FOLDER")
    given = parser.parse_args(arguments)
    settings = dict(setting.split("=", 1) for setting in given.set)
    print(f"# {' '.join(given.set) or 'as it is'}; load {os.getloadavg()[0]:.1f}", flush=True)
    with _running(settings) as system:
        asyncio.run(_measure(system, given))


if __name__ == "__main__":
    main()
