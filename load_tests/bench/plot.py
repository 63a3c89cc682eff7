"""The picture of a comparison: first tokens, throughput, CPU and memory, system by system."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from load_tests.bench.scenarios import Held, Latency, Throughput
from load_tests.figures import bars, drawn

_WIDTH, _HEIGHT = 8.0, 2.6


def draw(
    path: Path,
    latencies: Sequence[Latency],
    throughputs: Mapping[str, Sequence[Throughput]],
    held: Sequence[Held],
) -> bool:
    """Draw what there is to `path`; False where there is nothing."""
    drawings: list[Callable[[Any], None]] = []
    if latencies:
        drawings.append(lambda axes: _first_tokens(axes, latencies))
    if throughputs:
        drawings += [
            lambda axes: _answers(axes, throughputs),
            lambda axes: _cpu(axes, throughputs),
        ]
    if held:
        drawings.append(lambda axes: _memory(axes, held))
    if not drawings:
        return False
    with drawn(path, len(drawings), size=(_WIDTH, _HEIGHT * len(drawings))) as all_axes:
        for axes, drawing in zip(all_axes, drawings, strict=True):
            drawing(axes)
    return True


def _first_tokens(axes: Any, latencies: Sequence[Latency]) -> None:
    series = {
        "p50": [one.ttft_p50_ms for one in latencies],
        "p99": [one.ttft_p99_ms for one in latencies],
    }
    bars(axes, [one.system for one in latencies], series)
    axes.set(title="One client, streaming", ylabel="first token, ms")


def _answers(axes: Any, throughputs: Mapping[str, Sequence[Throughput]]) -> None:
    _by_system(axes, throughputs, lambda one: one.answers_a_second)
    axes.set(title="Answers a second", ylabel="answers a second")
    # From one client to hundreds, small ones would not be seen.
    if len(throughputs) > 2:
        axes.set_yscale("log")


def _cpu(axes: Any, throughputs: Mapping[str, Sequence[Throughput]]) -> None:
    _by_system(axes, throughputs, lambda one: sum(one.cpu_s.values()) * 1000 / one.answers)
    axes.set(title="CPU of the system without engine and clients", ylabel="CPU ms an answer")


def _by_system(
    axes: Any,
    throughputs: Mapping[str, Sequence[Throughput]],
    figure: Callable[[Throughput], float],
) -> None:
    names = dict.fromkeys(one.system for rounds in throughputs.values() for one in rounds)
    series = {
        name: [
            statistics.median([figure(one) for one in rounds if one.system == name] or [0.0])
            for rounds in throughputs.values()
        ]
        for name in names
    }
    bars(axes, [*throughputs], series)


def _memory(axes: Any, held: Sequence[Held]) -> None:
    bars(
        axes,
        [one.system for one in held],
        {"KiB a stream": [sum(one.bytes_a_stream.values()) / 1024 for one in held]},
    )
    axes.set(title=f"{held[0].streams} slow streams", ylabel="KiB a stream, all parts")
