"""The targets of the comparison, and which of them a run reached.

They hold on a machine of two cores with everything on. What a run does not measure is said so.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from load_tests.bench.scenarios import Held, Latency, Throughput

OURS, LITELLM = "Comp AI", "LiteLLM"
STREAMING = "16 clients, streaming"
WHOLE = "64 clients, not streaming, 20 ms"
_MB, _KB = 1e6, 1e3


@dataclass(frozen=True)
class Row:
    """One target; `reached` is None where this run does not tell."""

    what: str
    wanted: str
    seen: str = "not measured in this run"
    reached: bool | None = None

    def __str__(self) -> str:
        verdict = {True: "reached", False: "**not reached**", None: ""}[self.reached]
        return f"| {self.what} | {self.wanted} | {self.seen} | {verdict} |"


def rows(
    engine: str,
    latencies: Sequence[Latency],
    throughputs: dict[str, list[Throughput]],
    held: Sequence[Held],
) -> list[Row]:
    """Return a row for each target, from what was measured on one kind of `engine`."""
    ours = next((one for one in latencies if one.system == OURS), None)
    streams = next((one for one in held if one.system == OURS), None)
    real = throughputs.get(STREAMING, []) if engine == "real" else []
    return [
        _of_bare(real),
        *_added(ours),
        _over_litellm(throughputs.get(WHOLE, [])),
        _streams(streams),
        _stages(ours),
        *_memory(streams),
        Row("time of a second `make run` to the first answer, over bare vLLM's start", "≤ 1.15"),
    ]


def over_first(rounds: Sequence[Throughput], system: str) -> list[float]:
    """Return tokens a second of `system` over those of the first system, round by round."""
    first = _of(rounds, rounds[0].system) if rounds else []
    pairs = zip(_of(rounds, system), first, strict=True)
    return [one.tokens_a_second / base.tokens_a_second for one, base in pairs]


def _of(rounds: Sequence[Throughput], system: str) -> list[Throughput]:
    return [one for one in rounds if one.system == system]


def _of_bare(rounds: Sequence[Throughput]) -> Row:
    what, wanted = "throughput with the real CPU engine, 16 clients, over bare vLLM", "≥ 0.97"
    ratios = over_first(rounds, OURS)
    if not ratios:
        return Row(what, wanted)
    ratio = statistics.median(ratios)
    return Row(what, wanted, f"{ratio:.2f}", ratio >= 0.97)


def _added(ours: Latency | None) -> Iterator[Row]:
    first, gap = "added time to first token, 1 client", "added inter-token latency"
    wanted = ("p50 ≤ 3 ms, p99 ≤ 10 ms", "p50 ≤ 0.1 ms")
    if ours is None:
        yield from (Row(first, wanted[0]), Row(gap, wanted[1]))
        return
    p50_ms, p99_ms = ours.added_ttft_p50_ms, ours.added_ttft_p99_ms
    told = f"p50 {p50_ms:.1f} ms, p99 {p99_ms:.1f} ms"
    yield Row(first, wanted[0], told, p50_ms <= 3 and p99_ms <= 10)
    gap_ms = ours.added_itl_p50_ms
    yield Row(gap, wanted[1], f"p50 {gap_ms:.2f} ms", gap_ms <= 0.1)


def _over_litellm(rounds: Sequence[Throughput]) -> Row:
    what = "requests a second per core on the fake model (not streaming, 20 ms), over LiteLLM"
    ours, theirs = (_a_core_second(rounds, system) for system in (OURS, LITELLM))
    if ours is None or theirs is None:
        return Row(what, "≥ 4 times")
    told = f"{ours / theirs:.1f} times ({ours:.0f} and {theirs:.0f})"
    return Row(what, "≥ 4 times", told, ours >= 4 * theirs)


def _a_core_second(rounds: Sequence[Throughput], system: str) -> float | None:
    known = [one.answers_a_core_second for one in _of(rounds, system)]
    return statistics.median(value for value in known if value is not None) if known else None


def _streams(ours: Held | None) -> Row:
    what, wanted = "concurrent streams without a stall on one gateway replica", "≥ 2,000"
    if ours is None:
        return Row(what, wanted)
    whole = ours.completed == ours.streams and not ours.stalled
    told = (
        f"{ours.completed} of {ours.streams} completed, {ours.stalled} stalled, "
        f"{ours.open_at_once} were open at once"
    )
    if whole and ours.open_at_once < 2000:
        return Row(what, wanted, f"{told}; more were not tried")
    return Row(what, wanted, told, whole)


def _stages(ours: Latency | None) -> Row:
    what, wanted = "authenticate + limits + record, together", "p50 ≤ 2 ms"
    if ours is None or not {"auth", "limits"} <= ours.stages_p50_ms.keys():
        return Row(what, wanted)
    ms = ours.stages_p50_ms["auth"] + ours.stages_p50_ms["limits"]
    told = f"{ms:.2f} ms without the record, which `Server-Timing` does not tell"
    return Row(what, wanted, told, None if ms <= 2 else False)


def _memory(ours: Held | None) -> Iterator[Row]:
    idle, stream = "memory of the gateway, idle", "memory of the gateway, a stream"
    if ours is None or "Gateway" not in ours.idle_bytes:
        yield from (Row(idle, "≤ 200 MB"), Row(stream, "≤ 40 KB"))
        return
    before = ours.idle_bytes["Gateway"]
    yield Row(idle, "≤ 200 MB", f"{before / _MB:.0f} MB", before <= 200 * _MB)
    each = ours.bytes_a_stream.get("Gateway")
    if each is None:
        yield Row(stream, "≤ 40 KB")
    else:
        yield Row(stream, "≤ 40 KB", f"{each / _KB:.0f} KB", each <= 40 * _KB)
