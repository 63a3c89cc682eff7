"""Pictures of what was measured, as SVG beside the figures. Wants matplotlib: `make drawing`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MISSING = "There is no picture: matplotlib is not installed (`make drawing`)."
# The same picture is the same file.
_STYLE: dict[Any, Any] = {"svg.hashsalt": "comp-ai", "svg.fonttype": "none", "font.size": 9}


def can_draw() -> bool:
    """Tell whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


@contextmanager
def drawn(
    path: Path, rows: int, *, size: tuple[float, float], heights: Sequence[float] | None = None
) -> Iterator[list[Any]]:
    """Yield the axes of a new picture, one below the other; write it to `path` at the end.

    Args:
        size: width and height in inches.
        heights: of the axes, against each other; all the same where not given.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(_STYLE)
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        rows, 1, figsize=size, height_ratios=heights, squeeze=False, layout="tight"
    )
    try:
        yield list(axes[:, 0])
        figure.savefig(path, metadata={"Date": None})
    finally:
        pyplot.close(figure)


def bars(axes: Any, groups: Sequence[str], series: Mapping[str, Sequence[float]]) -> None:
    """Draw bars side by side: for each of `groups` one of each of `series`, with its value."""
    width = 0.8 / max(1, len(series))
    for number, (name, values) in enumerate(series.items()):
        at = [group + (number - (len(series) - 1) / 2) * width for group in range(len(groups))]
        drawn_bars = axes.bar(at, values, width * 0.92, label=name)
        axes.bar_label(drawn_bars, fmt="%.3g", fontsize=7)
    axes.set_xticks(range(len(groups)), groups)
    axes.margins(y=0.3)  # room for the values, and for the names above them
    if len(series) > 1:
        axes.legend(loc="upper center", ncols=len(series), fontsize=7)
