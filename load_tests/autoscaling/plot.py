"""The picture: one day, and what each policy costs and yields."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from load_tests.autoscaling.simulation import Day
from load_tests.autoscaling.trace import Request, rate_per_s
from load_tests.figures import drawn

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_EVERY_S = 120.0
_OURS, _RAYS = "#1b7f5c", "#b4552d"


def draw(
    requests: list[Request],
    days: dict[str, Day],
    medians: dict[str, dict[str, float]],
    path: Path,
) -> None:
    """Write the picture of a day and of the medians of all days to `path`, an SVG."""
    with drawn(path, 3, size=(8, 9), heights=(1, 1.3, 1.7)) as axes:
        _draw_requests(axes[0], requests)
        _draw_replicas(axes[1], days)
        _draw_medians(axes[2], medians)


def _draw_requests(axes: Axes, requests: list[Request]) -> None:
    rates = rate_per_s(requests, _EVERY_S)
    hours = [index * _EVERY_S / 3600 for index in range(len(rates))]
    axes.fill_between(hours, rates, color="#9aa7b0", step="post")
    axes.set(xlim=(0, 24), ylabel="requests a second", title="One of the days")


def _draw_replicas(axes: Axes, days: dict[str, Day]) -> None:
    for name, day in days.items():
        hours = [index * day.decide_every_s / 3600 for index in range(len(day.replicas))]
        axes.step(hours, day.replicas, where="post", color=_color(name), label=name, linewidth=1.2)
    axes.set(xlim=(0, 24), xlabel="hour", ylabel="replicas", ylim=(0, None))
    axes.legend(loc="upper left")


def _draw_medians(axes: Axes, medians: dict[str, dict[str, float]]) -> None:
    middle = statistics.mean(row["replica_hours"] for row in medians.values())
    for name, row in medians.items():
        at = (row["replica_hours"], row["late_percent"])
        axes.plot(*at, "o", color=_color(name))
        # Towards the middle, so that no name leaves the picture.
        left = at[0] > middle
        axes.annotate(
            name,
            at,
            xytext=(-7 if left else 7, 4),
            textcoords="offset points",
            horizontalalignment="right" if left else "left",
        )
    axes.set(
        yscale="log",
        xlabel="replica hours a day",
        ylabel="first tokens that are late, %",
        title="All days: down and left is better",
    )
    axes.margins(x=0.1, y=0.15)
    axes.grid(which="both", alpha=0.3)


def _color(name: str) -> str:
    return _OURS if name.startswith("ours") else _RAYS
