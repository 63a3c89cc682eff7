"""Locust's users against a gateway with a fake engine: what they report, and how a run ends."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.integration.fakes import KEY, World, world

PROJECT = Path(__file__).parents[2]
LOCUST = Path(sys.executable).parent / "locust"


async def locust(served: World, file: str, *arguments: str) -> tuple[int, dict[Any, Any], str]:
    """Run Locust for some seconds; return its exit code, its entries by kind and name, its log."""
    process = await asyncio.create_subprocess_exec(
        LOCUST,
        *("-f", f"load_tests/{file}", "--host", served.url, "--model", "small"),
        *("--headless", "--only-summary", "--json", "--run-time", "4s", *arguments),
        cwd=PROJECT,
        env={"PATH": os.environ["PATH"], "LOCUST_KEY": KEY},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    found = {(one["method"], one["name"]): one for one in json.loads(out)}
    return process.returncode, found, err.decode()


async def test_users_of_each_kind_are_served_or_refused_as_they_should_be() -> None:
    async with world() as served:
        code, found, log = await locust(
            served,
            "locustfile.py",
            *("--users", "20", "--spawn-rate", "50"),
            *("ChatUser", "LongPromptUser", "ImpatientUser", "AbusiveUser"),
        )
        left = [row for row in served.records if row.outcome == "cancelled"]
    assert code == 0, log
    assert {kind for kind, _ in found} == {"POST", "TTFT", "ITL"}
    assert not any(entry["num_failures"] for entry in found.values())
    chat = found["POST", "chat"]["num_requests"]
    assert chat == found["TTFT", "chat"]["num_requests"] > 0
    # An answer has 20 tokens at least.
    assert found["ITL", "chat"]["num_requests"] >= 19 * chat
    assert any(name.startswith("abusive: ") for _, name in found)
    assert left


async def test_a_run_that_breaks_a_threshold_ends_with_an_error() -> None:
    async with world() as served:
        code, _, log = await locust(
            served, "locustfile.py", "--users", "2", "--ttft-p95-ms", "0.001", "ChatUser"
        )
    assert code == 1
    assert "threshold: time to first token, p95: " in log


async def test_refusals_are_failures_under_their_code() -> None:
    async with world(limits={"default": {"requests_per_minute": 1}}) as served:
        code, found, log = await locust(served, "locustfile.py", "--users", "3", "ChatUser")
    assert code == 1
    assert found["POST", "chat"]["num_failures"] >= 2
    assert "refused: 429 rate_limit_exceeded" in log


async def test_a_trace_is_replayed_at_its_times(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    lines = [f"2023-11-16 18:15:4{at}.0000000,50,{at + 1}" for at in range(8)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]) + "\n")
    async with world() as served:
        code, found, log = await locust(
            served, "replay.py", "--users", "1", "--trace", str(trace), "--faster", "8"
        )
        asked = [row.completion_tokens for row in served.records]
    assert code == 0, log
    assert found["POST", "conversation"]["num_requests"] == 8
    assert sorted(asked) == [1, 2, 3, 4, 5, 6, 7, 8]
