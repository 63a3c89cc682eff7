"""What is done to the systems, and the figures that come of it."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import aiohttp

from load_tests.bench.asking import (
    Answer,
    AnswerCut,
    Question,
    ask,
    ask_in_turn,
    client,
    keep_asking,
)
from load_tests.bench.cost import resident_bytes, spending
from load_tests.bench.systems import System

_WARM_CLIENTS = 4
_WARM_ANSWERS = 24


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Of one system with one client: times are milliseconds.

    `added_*` is the difference to the first system, answer by answer of the same round.
    """

    system: str
    ttft_p50_ms: float
    ttft_p99_ms: float
    itl_p50_ms: float
    itl_p99_ms: float
    added_ttft_p50_ms: float
    added_ttft_p99_ms: float
    added_itl_p50_ms: float
    stages_p50_ms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Of one system in one round.

    `cpu_s` is by part of the system, without the engine and without the clients.
    """

    system: str
    clients: int
    answers: int
    took_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    itl_p50_ms: float
    itl_p99_ms: float
    tokens_a_second: float
    answers_a_second: float
    cpu_s: dict[str, float]

    @property
    def answers_a_core_second(self) -> float | None:
        """Answers for one CPU second of the system; None for the bare engine, which has none."""
        spent_s = sum(self.cpu_s.values())
        return self.answers / spent_s if spent_s else None

    @property
    def cpu_ms_a_thousand_tokens(self) -> float:
        """CPU milliseconds of the system for each 1,000 tokens."""
        return sum(self.cpu_s.values()) * 1e6 / (self.tokens_a_second * self.took_s)


async def warm(systems: Sequence[System], question: Question) -> None:
    """Ask each until its connections are open and its code is in memory."""
    for system in systems:
        await keep_asking(system.door, question, clients=_WARM_CLIENTS, answers=_WARM_ANSWERS)


async def one_client(
    systems: Sequence[System], question: Question, *, rounds: int
) -> list[Latency]:
    """Ask the systems in turn, one request at a time; compare each with the first."""
    seen = await ask_in_turn([system.door for system in systems], question, rounds=rounds)
    bare = [answers[0] for answers in seen]
    return [
        _latency(system.name, [answers[index] for answers in seen], bare)
        for index, system in enumerate(systems)
    ]


async def many_clients(
    systems: Sequence[System], question: Question, *, clients: int, answers: int, rounds: int
) -> list[Throughput]:
    """Keep `clients` asking each system, system after system, and that `rounds` times."""
    found = []
    for number in range(rounds):
        # Each round begins with another one, so that none always comes first.
        shift = number % len(systems)
        for system in [*systems[shift:], *systems[:shift]]:
            found.append(await _busy(system, question, clients, answers))
    return found


async def _busy(system: System, question: Question, clients: int, answers: int) -> Throughput:

    begun_s = time.perf_counter()
    with spending(system.processes) as spent:
        seen = await keep_asking(system.door, question, clients=clients, answers=answers)
        took_s = time.perf_counter() - begun_s
    firsts_ms = [answer.first_s * 1000 for answer in seen]
    gaps_ms = _gaps_ms(seen)
    return Throughput(
        system=system.name,
        clients=clients,
        answers=len(seen),
        took_s=took_s,
        ttft_p50_ms=percentile(firsts_ms, 50),
        ttft_p99_ms=percentile(firsts_ms, 99),
        itl_p50_ms=percentile(gaps_ms, 50),
        itl_p99_ms=percentile(gaps_ms, 99),
        tokens_a_second=len(seen) * question.tokens / took_s,
        answers_a_second=len(seen) / took_s,
        cpu_s=spent.cpu_s,
    )


def _latency(name: str, seen: Sequence[Answer], bare: Sequence[Answer]) -> Latency:
    firsts_ms = [answer.first_s * 1000 for answer in seen]
    added_ms = [(a.first_s - b.first_s) * 1000 for a, b in zip(seen, bare, strict=True)]
    gaps_ms, bare_gaps_ms = _gaps_ms(seen), _gaps_ms(bare)
    return Latency(
        system=name,
        ttft_p50_ms=percentile(firsts_ms, 50),
        ttft_p99_ms=percentile(firsts_ms, 99),
        itl_p50_ms=percentile(gaps_ms, 50),
        itl_p99_ms=percentile(gaps_ms, 99),
        added_ttft_p50_ms=percentile(added_ms, 50),
        added_ttft_p99_ms=percentile(added_ms, 99),
        added_itl_p50_ms=percentile(gaps_ms, 50) - percentile(bare_gaps_ms, 50),
        stages_p50_ms=_stages(answer.server_timing for answer in seen),
    )


def _gaps_ms(seen: Iterable[Answer]) -> list[float]:
    return [gap_s * 1000 for answer in seen for gap_s in answer.gaps_s]


def _stages(headers: Iterable[str | None]) -> dict[str, float]:
    """Return the median of each stage of `Server-Timing` headers, in milliseconds."""
    durations: dict[str, list[float]] = {}
    for header in headers:
        for entry in (header or "").split(","):
            name, _, duration = entry.strip().partition(";dur=")
            if duration:
                durations.setdefault(name, []).append(float(duration.partition(";")[0]))
    return {name: statistics.median(values) for name, values in durations.items()}


def percentile(values: Sequence[float], percent: int) -> float:
    """Return a percentile by linear interpolation; 0 where there are no values."""
    if len(values) < 2:
        return values[0] if values else 0.0
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


@dataclass(frozen=True, kw_only=True)
class Held:
    """Many slow streams held open at once by one system.

    `*_bytes` are proportional set sizes of its processes, by part, before the streams were
    opened and while all are open. A stall is a gap of more than three times the engine's own.
    """

    system: str
    streams: int
    completed: int
    stalled: int
    longest_gap_s: float
    idle_bytes: dict[str, int]
    full_bytes: dict[str, int]

    @property
    def bytes_a_stream(self) -> float:
        """Resident bytes that one stream adds, over all parts of the system."""
        return (sum(self.full_bytes.values()) - sum(self.idle_bytes.values())) / self.streams


async def many_streams(
    systems: Sequence[System], question: Question, *, streams: int, ramp_s: float, gap_s: float
) -> list[Held]:
    """Open `streams` at each system in turn, over `ramp_s`; each frame is due after `gap_s`."""
    return [await _hold(system, question, streams, ramp_s, gap_s) for system in systems]


async def _hold(
    system: System, question: Question, streams: int, ramp_s: float, gap_s: float
) -> Held:
    idle = resident_bytes(system.processes)
    loop = asyncio.get_running_loop()
    full_at_s = loop.time() + ramp_s + 2 * gap_s

    async def one(http: aiohttp.ClientSession, number: int) -> Answer | None:
        await asyncio.sleep(number * ramp_s / streams)
        try:
            return await ask(http, system.door, question)
        except (aiohttp.ClientError, AnswerCut, TimeoutError):
            return None

    async with client() as http:
        asked = [asyncio.create_task(one(http, number)) for number in range(streams)]
        await asyncio.sleep(full_at_s - loop.time())
        full = await asyncio.to_thread(resident_bytes, system.processes)
        answers = [answer for answer in await asyncio.gather(*asked) if answer is not None]
    longest_s = [max(answer.gaps_s, default=0.0) for answer in answers]
    return Held(
        system=system.name,
        streams=streams,
        completed=len(answers),
        stalled=sum(gap > 3 * gap_s for gap in longest_s),
        longest_gap_s=max(longest_s, default=0.0),
        idle_bytes=idle,
        full_bytes=full,
    )
