"""An hour at 70 % of the load with churn: does memory grow, do files or threads, the spool?

    .venv/bin/python -m load_tests.soak --minutes 60 --out load_tests/results
    .venv/bin/python -m load_tests.soak --minutes 4 --set COMP_AI_HAPROXY=false

Starts a stack with the fake model and first finds the highest rate at which first tokens come in
time. Results are written every few minutes. Exit code 1 if something grows, is left at rest, or
fails; everything that was started is gone at the end, also where it ends by SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from load_tests.bench.asking import Door
from load_tests.bench.scenarios import percentile
from load_tests.ending import end_in_order
from load_tests.figures import MISSING, can_draw
from load_tests.open_files import raise_file_limit
from load_tests.soak import report
from load_tests.soak.capacity import Step, TooSlow, find_rate, hold_rate
from load_tests.soak.churn import Churn
from load_tests.soak.watching import EVERY_S, Findings, lasting, rest, sample
from tests.serve_configs import FAKE_MODEL, suite_config
from tests.stack_runner import RunningStack, running_stack

RESULTS = Path(__file__).resolve().parents[1] / "results"
_LOAD = 0.7
_TOKENS = (1, 40)
_STEP_S = 8.0
_HELD_S = 60.0
_WARM_UP_S = 5.0
_MOST_FAILED = 0.01
# Idle connections are closed after a minute, on either side.
_CLOSED_S = 75.0
_REST_S = 60.0
_WRITE_EVERY = 18
# Beside the minutes: the start, the steps, the rests and the end.
_BESIDE_S = 1200.0


async def _find_rate(churn: Churn, findings: Findings) -> float:
    """Step up until first tokens come late, and down to what is held. Raises TooSlow."""

    async def try_rate(a_second: float, seconds: float = _STEP_S) -> Step:
        seen = churn.forget()
        await churn.at_rate(a_second, seconds)
        ttft_p95_ms = percentile([first_s * 1000 for first_s in seen.firsts_s], 95)
        asked = seen.asked.total()
        in_time = ttft_p95_ms <= findings.ttft_p95_bound_ms
        step = Step(
            a_second=a_second,
            asked=asked,
            failures=seen.failures,
            ttft_p95_ms=ttft_p95_ms,
            kept=in_time and seen.failures <= _MOST_FAILED * asked,
        )
        print(step, flush=True)
        return step

    await churn.at_rate(2.0, _WARM_UP_S)
    rate, findings.steps = await find_rate(try_rate)
    await asyncio.sleep(_CLOSED_S)
    rate, held = await hold_rate(lambda a_second: try_rate(a_second, _HELD_S), rate)
    findings.steps += held
    return rate


async def _soak(stack: RunningStack, findings: Findings, out: Path | None) -> None:
    churn = Churn(Door(url=stack.url, headers=stack.bootstrap), FAKE_MODEL, _TOKENS)
    findings.rate = _LOAD * await _find_rate(churn, findings)
    await asyncio.sleep(_CLOSED_S)
    findings.rest_before = await rest(stack, {}, longest_s=_REST_S)
    born = lasting(stack)
    findings.seen = churn.forget()
    asking = asyncio.create_task(churn.at_rate(findings.rate, findings.minutes * 60))
    try:
        await _watch(stack, findings, asking, out)
    finally:
        asking.cancel()
        await asyncio.wait([asking])
    await asyncio.sleep(_CLOSED_S)
    findings.rest_after = await rest(stack, findings.rest_before, longest_s=_REST_S)
    engine = await asyncio.to_thread(stack.engine, FAKE_MODEL)
    findings.leases_left = engine["live_leases"]
    now = lasting(stack)
    findings.replaced = [part for part, pids in born.items() if now.get(part) != pids]


async def _watch(
    stack: RunningStack, findings: Findings, asking: asyncio.Task[None], out: Path | None
) -> None:
    """Take samples until all was asked, and write now and then, lest an end loses all."""
    begun_s = time.monotonic()
    while not asking.done():
        await asyncio.wait([asking], timeout=EVERY_S)
        await sample(stack, findings, begun_s)
        if out is not None and len(findings.samples) % _WRITE_EVERY == 0:
            await asyncio.to_thread(report.write, findings, out, picture=False)
    asking.result()


def run(findings: Findings, settings: dict[str, str], out: Path | None) -> None:
    """Run the soak; note in `findings` what was seen, and write it to `out` in any case."""
    findings.broke = "it did not come to its end"
    try:
        with running_stack(suite_config(real_model=False, gateways=1), **settings) as stack:
            asyncio.run(_soak(stack, findings, out))
        findings.broke = None
    except TooSlow:
        findings.broke = "no rate was kept"
    finally:
        if out is not None:
            report.write(findings, out, picture=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--ttft-p95-ms", type=float, default=250.0, help="late is above it")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--out", type=Path, help=f"folder for results, as {RESULTS}")
    return parser.parse_args(arguments)


def main() -> int:
    """Soak; return the exit code."""
    given = parse()
    end_in_order(given.minutes * 60 + _BESIDE_S)
    raise_file_limit()
    if not can_draw():
        print(MISSING, file=sys.stderr)
    findings = Findings(
        minutes=given.minutes, ttft_p95_bound_ms=given.ttft_p95_ms, load_before=os.getloadavg()[0]
    )
    settings = dict(setting.split("=", 1) for setting in given.set)
    run(findings, settings, given.out)
    print(report.markdown(findings, drawing=False))
    return 1 if findings.faults() else 0


if __name__ == "__main__":
    sys.exit(main())
