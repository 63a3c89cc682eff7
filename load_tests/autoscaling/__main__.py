"""Run the days, write `load_tests/results/autoscaling.{json,md,svg}`.

Needs matplotlib: `make drawing`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from load_tests.autoscaling.plot import draw
from load_tests.autoscaling.policies import Controller, our_policy, rays_policy
from load_tests.autoscaling.simulation import Day, Simulation
from load_tests.autoscaling.trace import bursty_day

RESULTS = Path(__file__).parents[1] / "results"
_DAYS = 3
_BUSIEST_PER_S = 3.0
_START_S = 120.0
_OTHER_STARTS_S = (60.0, 180.0)
# What a first token may take before somebody counts it as late.
_LATE_S = 5.0
_BOUNDS = {"min_replicas": 1, "max_replicas": 6}

Policies = dict[str, Callable[[], Controller]]


def _ray(target: float, upscale_delay_s: float = 15) -> Callable[[], Controller]:
    delays = {"upscale_delay_s": upscale_delay_s, "downscale_delay_s": 600}
    return lambda: rays_policy(target, **delays, **_BOUNDS)


def _ours(first_token_s: float) -> Callable[[], Controller]:
    targets = {"queue_wait_s": 1.0, "time_to_first_token_s": first_token_s}
    delays = {"upscale_delay_s": 15, "downscale_delay_s": 300}
    return lambda: our_policy(128, targets, **delays, **_BOUNDS)


_COMPARED: Policies = {
    "Ray's, as it is by default (2 requests)": _ray(2, upscale_delay_s=30),
    "Ray's, 4 requests": _ray(4),
    "Ray's, 8 requests": _ray(8),
    "Ray's, 16 requests": _ray(16),
    "ours, first token 2 s": _ours(2),
    "ours, first token 3 s": _ours(3),
}
_BY_START: Policies = {
    name: _COMPARED[name] for name in ("Ray's, 4 requests", "ours, first token 2 s")
}


def figures(day: Day) -> dict[str, float]:
    """Return what matters of a day."""
    waits = statistics.quantiles(day.waits_s, n=100)
    first = statistics.quantiles(day.first_tokens_s, n=100)
    late = sum(each > _LATE_S for each in day.first_tokens_s) / len(day.jobs)
    changes = sum(a != b for a, b in itertools.pairwise(day.replicas))
    return {
        "replica_hours": day.replica_hours,
        "wait_p50_s": waits[49],
        "wait_p95_s": waits[94],
        "wait_p99_s": waits[98],
        "first_token_p50_s": first[49],
        "first_token_p95_s": first[94],
        "first_token_p99_s": first[98],
        "late_percent": 100 * late,
        "changes": changes,
    }


def run(
    policies: Policies, start_s: float, seeds: Sequence[int]
) -> tuple[dict[str, dict[str, float]], dict[str, Day]]:
    """Return the medians over the seeds, and the days of the first seed."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in policies}
    days: dict[str, Day] = {}
    for seed in seeds:
        requests = bursty_day(seed, _BUSIEST_PER_S)
        for name, policy in policies.items():
            day = Simulation(requests, policy(), start_s, seed).run()
            found[name].append(figures(day))
            days.setdefault(name, day)
            print(f"start {start_s:g} s, seed {seed}: {name}", flush=True)
    return {name: _medians(each) for name, each in found.items()}, days


def _medians(each: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(one[key] for one in each), 2) for key in each[0]}


def _table(rows: dict[str, dict[str, float]]) -> str:
    heads = "replica hours | wait p50 | p95 | p99 | first token p50 | p95 | p99 | late | changes"
    lines = [f"| policy | {heads} |", "| --- |" + " --- |" * 9]
    for name, row in rows.items():
        hours, *seconds, late, changes = row.values()
        shown = " | ".join(f"{one:.2f} s" for one in seconds)
        lines.append(f"| {name} | {hours:.1f} | {shown} | {late:.2f}% | {changes:.0f} |")
    return "\n".join(lines)


def _text(by_start: dict[float, dict[str, dict[str, float]]], days: int) -> str:
    tables = [
        f"## Replicas start in {start_s:g} s\n\n{_table(rows)}"
        for start_s, rows in by_start.items()
    ]
    return _INTRODUCTION.format(days=days) + "\n\n" + "\n\n".join(tables) + "\n"


_INTRODUCTION = f"""# A bursty day, scaled by two policies

![One day of replicas, and what each policy costs and yields](autoscaling.svg)

Simulated: `python -m load_tests.autoscaling`. Medians of {{days}} days, each with about
120,000 requests: the hours of an office, bursts, and six jobs of long prompts that nobody
announces. The trace is made from published figures, see `load_tests/autoscaling/trace.py`; the
speed of the engine is assumed, see `Speed` in `engine.py`. Between 1 and 6 replicas; each start
takes a quarter more or less than is said. The policies are the code of production: ours from
`deployments/scaling.py`, Ray's default imported from Ray, both within Ray's own delays. Waits are
from coming to being begun by an engine, first tokens from coming to the first token; late is a
first token after more than {_LATE_S:g} s.

Ray's policy goes by the number of requests at a replica, here with its default of 600 s before
one is given up (ours: 300 s for each). A low number keeps people served and costs more replicas;
with a higher one a few long prompts fill an engine before anything is done. What it is right for
changes with the prompts of the hour, and our policy needs no such number. Neither helps in the
minutes in which a replica starts: there `full` and `downscale_delay_s` decide how much is spare.

A simulation orders policies; its figures are those of its assumptions and not of a GPU."""


def main() -> None:
    """Run, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--days", type=int, default=_DAYS, help="how many, each of another seed")
    seeds = range(1, parser.parse_args().days + 1)
    compared, days = run(_COMPARED, _START_S, seeds)
    shown = {name: days[name] for name in ("Ray's, 8 requests", "ours, first token 2 s")}
    draw(bursty_day(seeds[0], _BUSIEST_PER_S), shown, compared, RESULTS / "autoscaling.svg")
    by_start = {_START_S: compared}
    _write(by_start, seeds)
    for start_s in _OTHER_STARTS_S:
        by_start[start_s], _ = run(_BY_START, start_s, seeds)
        _write(by_start, seeds)


def _write(by_start: dict[float, dict[str, dict[str, float]]], seeds: Sequence[int]) -> None:
    machine = f"{platform.machine()}, {os.cpu_count()} cores, no GPU; simulated time"
    data = {
        "machine": machine,
        "seeds": list(seeds),
        "late_s": _LATE_S,
        "by_start_s": by_start,
    }
    RESULTS.joinpath("autoscaling.json").write_text(json.dumps(data, indent=2) + "\n", "utf-8")
    RESULTS.joinpath("autoscaling.md").write_text(_text(by_start, len(seeds)), "utf-8")


if __name__ == "__main__":
    main()
