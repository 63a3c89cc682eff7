"""Many slow streams at once on the fake model, through nginx: is one lost, does one stall?

    .venv/bin/python -m load_tests.slow_streams --streams 2000

Starts a stack of its own. Clients are in processes of
their own, so that a busy client is not taken for a slow service. Writes what it saw to
`load_tests/results/`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import statistics
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from load_tests.open_files import raise_file_limit
from tests.serve_configs import FAKE_MODEL, suite_config
from tests.stack_runner import RunningStack, running_stack

RESULTS = Path(__file__).parent / "results"
_CLIENT_PROCESSES = 2
_SAMPLE_EVERY_S = 5.0
_ROWS_TIMEOUT_S = 60.0
_ROOM = 1.25  # of every limit over the streams that are asked for
# What is watched, by a part of its title; nginx has a worker a core.
_WATCHED = {
    "gateway": "ServeReplica:gateway:Gateway",
    "request log": "ServeReplica:gateway:RequestLog",
    "limits": "ServeReplica:gateway:Limits",
    "HAProxy": "/haproxy.cfg",
    "Serve's own proxy": "ProxyActor",
    "nginx": "nginx: worker",
    "fake model": f"ServeReplica:{FAKE_MODEL}",
}


@dataclass(frozen=True)
class Load:
    """What the clients do."""

    streams: int
    tokens: int
    time_per_token_s: float
    ramp_s: float


@dataclass
class Stream:
    """What the client of one stream saw; times in seconds."""

    request_id: str
    ended: str = "lost"
    frames: int = 0
    first_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Memory:
    """Resident MiB of each part at one time, and how many streams were open."""

    at_s: float
    rss_mib: dict[str, float]
    cpu_s: dict[str, float]


async def _stream(http: aiohttp.ClientSession, url: str, load: Load, delay_s: float) -> Stream:
    seen = Stream(uuid.uuid4().hex)
    body = {
        "model": FAKE_MODEL,
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": load.tokens,
        "stream": True,
    }
    await asyncio.sleep(delay_s)
    begun_s = last_s = time.perf_counter()
    try:
        async with http.post(
            f"{url}/v1/chat/completions", json=body, headers={"X-Request-ID": seen.request_id}
        ) as response:
            if response.status != 200:
                error = (await response.json())["error"]
                seen.ended = f"{response.status} {error['code']}"
                return seen
            tail = b""
            async for chunk in response.content.iter_any():
                now_s = time.perf_counter()
                if seen.frames:
                    seen.gaps_s.append(now_s - last_s)
                else:
                    seen.first_s = now_s - begun_s
                last_s = now_s
                seen.frames += chunk.count(b"data: ")
                tail = (tail + chunk)[-64:]
            seen.ended = "completed" if tail.endswith(b"data: [DONE]\n\n") else "cut"
    except (aiohttp.ClientError, TimeoutError) as error:
        seen.ended = type(error).__name__
    return seen


async def _clients(url: str, headers: dict[str, str], load: Load) -> list[Stream]:
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_read=180),
        headers=headers,
    ) as http:
        pause_s = load.ramp_s / max(1, load.streams)
        streams = (_stream(http, url, load, n * pause_s) for n in range(load.streams))
        return list(await asyncio.gather(*streams))


def _process(url: str, headers: dict[str, str], load: Load) -> list[Stream]:
    return asyncio.run(_clients(url, headers, load))


def _drive(stack: RunningStack, load: Load) -> list[Stream]:
    share = Load(load.streams // _CLIENT_PROCESSES, load.tokens, load.time_per_token_s, load.ramp_s)
    with multiprocessing.get_context("spawn").Pool(_CLIENT_PROCESSES) as pool:
        arguments = [(stack.url, stack.bootstrap, share)] * _CLIENT_PROCESSES
        return [stream for part in pool.starmap(_process, arguments) for stream in part]


class _Sampler(threading.Thread):
    """Reads the memory of the stack's parts until it is told to stop."""

    def __init__(self, stack: RunningStack) -> None:
        super().__init__(daemon=True)
        self._parts = {name: stack.processes(title) for name, title in _WATCHED.items()}
        self._ended = threading.Event()
        self._begun_s = time.monotonic()
        self.samples: list[Memory] = []

    def run(self) -> None:
        """Sample every few seconds."""
        while True:
            self.sample()
            if self._ended.wait(_SAMPLE_EVERY_S):
                return

    def sample(self) -> None:
        """Take one sample now."""
        rss = {name: _rss_mib(parts) for name, parts in self._parts.items()}
        cpu = {name: _cpu_s(parts) for name, parts in self._parts.items()}
        self.samples.append(Memory(time.monotonic() - self._begun_s, rss, cpu))

    def stop(self) -> None:
        """End the sampling."""
        self._ended.set()
        self.join()


def _rss_mib(processes: list[psutil.Process]) -> float:
    alive = [process for process in processes if process.is_running()]
    return round(sum(process.memory_info().rss for process in alive) / 2**20, 1)


def _cpu_s(processes: list[psutil.Process]) -> float:
    alive = [process for process in processes if process.is_running()]
    return round(sum(sum(process.cpu_times()[:2]) for process in alive), 2)


def _config(load: Load) -> dict[str, Any]:
    room = int(load.streams * _ROOM)
    config = suite_config(real_model=False, gateways=1)
    gateway, model = config["applications"][0]["deployments"][0], config["applications"][1]
    gateway["max_ongoing_requests"] = room
    # On a busy machine leases may take longer than a user would wait: each is to be had.
    gateway["user_config"]["queue_timeout_s"] = 120
    gateway["user_config"]["limits"]["default"] = {
        "requests_per_minute": 1_000_000,
        "concurrency": room,
    }
    model["args"]["speed"] = {
        "time_to_first_token_s": load.time_per_token_s,
        "time_per_token_s": load.time_per_token_s,
    }
    model["deployments"][0] |= {"max_ongoing_requests": room, "max_queued_requests": room}
    return config


@dataclass(frozen=True)
class Outcome:
    """Everything that was seen."""

    load: Load
    streams: list[Stream]
    memory: list[Memory]
    outcomes: list[str]
    rows_tokens: int


def _run(load: Load) -> Outcome:
    raise_file_limit()
    with running_stack(_config(load)) as stack:
        _drive(stack, Load(100, 5, load.time_per_token_s, 1.0))  # warm
        sampler = _Sampler(stack)
        sampler.start()
        streams = _drive(stack, load)
        sampler.stop()
        print("ended:", Counter(stream.ended for stream in streams), flush=True)
        ids = [stream.request_id for stream in streams]
        found = _rows(stack, ids)
    return Outcome(
        load,
        streams,
        sampler.samples,
        outcomes=[row["outcome"] for row in found],
        rows_tokens=sum(row["completion_tokens"] for row in found),
    )


def _rows(stack: RunningStack, ids: list[str]) -> list[Any]:
    """Return the rows of these requests, once all are there or no more come."""
    query = "select outcome, completion_tokens from comp_ai.requests where request_id = any($1)"
    found: list[Any] = []
    deadline_s = time.monotonic() + _ROWS_TIMEOUT_S
    while len(found) < len(ids) and time.monotonic() < deadline_s:
        time.sleep(1)
        found = stack.rows(query, ids)
    return found


def _counted(ends: Iterable[str]) -> str:
    return ", ".join(f"{count} {end}" for end, count in Counter(ends).most_common())


def _percentiles(values: list[float]) -> str:
    if len(values) < 2:
        return "-"
    cuts = statistics.quantiles(values, n=100)
    return f"{cuts[49]:.2f} / {cuts[98]:.2f} / {max(values):.2f}"


def _report(outcome: Outcome) -> str:
    load, streams = outcome.load, outcome.streams
    gaps_s = [gap for stream in streams for gap in stream.gaps_s]
    stalled = sum(max(stream.gaps_s, default=0) > 15 for stream in streams)
    lines = [
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB, Python {platform.python_version()}, "
        f"ray {version('ray')}; {load.streams} streams of {load.tokens} tokens, one every "
        f"{load.time_per_token_s:g} s, opened over {load.ramp_s:g} s; one gateway, fake model, "
        "bodies full, durability sync; clients on the same machine.",
        "",
        "| | |",
        "| --- | --- |",
        f"| streams by how they ended | {_counted(stream.ended for stream in streams)} |",
        f"| streams with a gap over 15 s | {stalled} |",
        f"| rows in PostgreSQL by outcome | {_counted(outcome.outcomes)} |",
        f"| tokens in the rows | {outcome.rows_tokens} of {load.streams * load.tokens} |",
        f"| time to the first frame, p50 / p99 / most, s "
        f"| {_percentiles([stream.first_s for stream in streams if stream.frames])} |",
        f"| gap between frames, p50 / p99 / most, s | {_percentiles(gaps_s)} |",
        "",
        *_memory_table(outcome),
    ]
    return "\n".join(lines)


def _memory_table(outcome: Outcome) -> list[str]:
    """Return resident memory before, and at quarters of the time in which all are open."""
    load, samples = outcome.load, outcome.memory
    full_s = load.ramp_s + 5, load.tokens * load.time_per_token_s
    times = [0.0, *(full_s[0] + (full_s[1] - full_s[0]) * part for part in (0, 0.33, 0.67, 1))]
    picked = [min(samples, key=lambda s: abs(s.at_s - at)) for at in times]
    picked.append(samples[-1])
    heads = ["before", *(f"{sample.at_s:.0f} s" for sample in picked[1:-1]), "at the end"]
    busy_s = max(1.0, picked[-2].at_s - picked[1].at_s)
    lines = [
        f"| resident, MiB | {' | '.join(heads)} | CPU while all are open |",
        "| --- |" + " --- |" * (len(heads) + 1),
    ]
    for name in _WATCHED:
        cells = [f"{sample.rss_mib[name]:.0f}" for sample in picked]
        cpu = (picked[-2].cpu_s[name] - picked[1].cpu_s[name]) / busy_s
        lines.append(f"| {name} | {' | '.join(cells)} | {cpu:.2f} cores |")
    return lines


def main() -> None:
    """Measure and report; the exit status tells whether every stream completed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--time-per-token-s", type=float, default=2.0)
    parser.add_argument("--ramp-s", type=float, default=30.0)
    given = parser.parse_args()
    outcome = _run(Load(given.streams, given.tokens, given.time_per_token_s, given.ramp_s))
    report = _report(outcome)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "slow_streams.md").write_text(report + "\n")
    raw = {
        "load": asdict(outcome.load),
        "memory": [asdict(sample) for sample in outcome.memory],
        "failed": [asdict(s) for s in outcome.streams if s.ended != "completed"][:100],
    }
    (RESULTS / "slow_streams.json").write_text(json.dumps(raw, indent=1) + "\n")
    print(report)
    lost = [stream for stream in outcome.streams if stream.ended != "completed"]
    raise SystemExit(1 if lost else 0)


if __name__ == "__main__":
    main()
