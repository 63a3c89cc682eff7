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
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import yaml

from tests.stack_runner import PROJECT, free_ports, running_stack, wait_until

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


@contextmanager
def _bare_vllm(models: str, engine: dict[str, Any]) -> Iterator[str]:
    port = free_ports(1)[0]
    flags = [
        flag
        for name, value in engine.items()
        for flag in _flag(f"--{name.replace('_', '-')}", value)
    ]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", f"{models}/{MODEL}", "--served-model-name", MODEL),
        *("--host", "127.0.0.1", "--port", str(port), *flags),
    ]
    env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        url = f"http://127.0.0.1:{port}"
        try:
            wait_until(lambda: _answers(f"{url}/health"), "bare vLLM", 300)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def _flag(name: str, value: object) -> list[str]:
    if isinstance(value, bool):
        return [name] if value else []
    return [name, str(value)]


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


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
    config = yaml.safe_load((PROJECT / "configs" / "local-cpu.yaml").read_text())
    engine = config["applications"][1]["args"]["engine"]
    gateway = config["applications"][0]["deployments"][0]
    gateway["user_config"]["limits"]["default"]["requests_per_minute"] = 100_000
    gateway["graceful_shutdown_timeout_s"] = 10
    with running_stack(config) as stack:
        token = stack.cli("token", "--subject", "bench").strip()
        ours = Target("Comp AI", stack.url, {"Authorization": f"Bearer {token}"})
        with _bare_vllm(stack.env["COMP_AI_MODEL_PATH"], engine) as url:
            samples = asyncio.run(_measure([Target("bare vLLM", url, {}), ours], rounds))
    report = _report(samples)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "compare_bare.md").write_text(report + "\n")
    raw = json.dumps([asdict(sample) for sample in samples], indent=1)
    (RESULTS / "compare_bare.json").write_text(raw + "\n")
    print(report)


if __name__ == "__main__":
    main()
