"""What is done to the systems, and the figures that come of it."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import aiohttp

from load_tests.bench.asking import (
    Answer,
    AnswerCut,
    Question,
    ask,
    client,
    keep_asking,
)
from load_tests.bench.cost import resident_bytes, spending
from load_tests.bench.systems import System

_WARM_CLIENTS = 4
_WARM_ANSWERS = 24
# None that works takes as long for a short answer, its first one included.
_ANSWERS_WITHIN_S = 120.0
# What slow streams have ahead of them when the last of them begins.
_FRAMES_TOGETHER = 10


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

    `cpu_s` is by part of the system, without the engine and without the clients; those, which are
    one process, spent `clients_cpu_s`.
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
    clients_cpu_s: float

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
        with _naming(system):
            await keep_asking(
                system.door,
                question,
                clients=_WARM_CLIENTS,
                answers=_WARM_ANSWERS,
                timeout_s=_ANSWERS_WITHIN_S,
            )


@contextmanager
def _naming(system: System) -> Iterator[None]:
    """Note at what goes wrong in the block which of the systems it was."""
    try:
        yield
    except (aiohttp.ClientError, AnswerCut, TimeoutError) as error:
        error.add_note(f"{system.name} was asked at {system.door.url}.")
        raise


async def one_client(
    systems: Sequence[System], question: Question, *, rounds: int, rest_s: float = 0.0
) -> list[Latency]:
    """Ask the systems in turn, one request at a time; compare each with the first.

    Args:
        rest_s: how long an engine is busy for itself after its last answer. That long nothing is
            asked, so that none is measured beside the one before it, and then a token is asked
            for, because the one whose turn it is was at rest itself.
    """
    seen = await _ask_in_turn(systems, question, rounds, rest_s)
    bare = [answers[0] for answers in seen]
    return [
        _latency(system.name, [answers[index] for answers in seen], bare)
        for index, system in enumerate(systems)
    ]


async def _ask_in_turn(
    systems: Sequence[System], question: Question, rounds: int, rest_s: float
) -> list[list[Answer]]:
    """Return the answers of each round, in the order of `systems`.

    One is asked after the other, so that whatever else the machine does hits all alike.
    """
    seen: list[list[Answer]] = []
    async with client(_ANSWERS_WITHIN_S) as http:
        for number in range(rounds):
            answers: dict[str, Answer] = {}
            for system in _beginning_with(number, systems):
                with _naming(system):
                    if rest_s:
                        await asyncio.sleep(rest_s)
                        await ask(http, system.door, replace(question, tokens=1))
                    answers[system.name] = await ask(http, system.door, question)
            seen.append([answers[system.name] for system in systems])
    return seen


async def many_clients(
    systems: Sequence[System], question: Question, *, clients: int, answers: int, rounds: int
) -> list[Throughput]:
    """Keep `clients` asking each system, system after system, and that `rounds` times."""
    found = []
    for number in range(rounds):
        for system in _beginning_with(number, systems):
            found.append(await _busy(system, question, clients, answers))
    return found


async def levels(
    systems: Sequence[System], question: Question, *, answers: Mapping[int, int], rounds: int
) -> AsyncIterator[tuple[int, list[Throughput]]]:
    """Keep more and more clients asking each system, and that `rounds` times.

    Args:
        answers: how many answers at each number of clients.

    Yields the number of clients and what each system did with them, round by round.
    """
    for number in range(rounds):
        for clients, wanted in answers.items():
            order = _beginning_with(number, systems)
            yield clients, [await _busy(one, question, clients, wanted) for one in order]


def _beginning_with(number: int, systems: Sequence[System]) -> list[System]:
    """Return the order of a round: each begins with another one, so that none is always first."""
    shift = number % len(systems)
    return [*systems[shift:], *systems[:shift]]


async def _busy(system: System, question: Question, clients: int, answers: int) -> Throughput:
    begun_s = time.perf_counter()
    clients_begun_s = time.process_time()
    with spending(system.processes) as spent, _naming(system):
        seen = await keep_asking(system.door, question, clients=clients, answers=answers)
        took_s = time.perf_counter() - begun_s
        clients_cpu_s = time.process_time() - clients_begun_s
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
        clients_cpu_s=clients_cpu_s,
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
    opened and while `open_at_once` of them are open. A stall is a gap of more than three times the
    engine's own.
    """

    system: str
    streams: int
    open_at_once: int
    completed: int
    stalled: int
    longest_gap_s: float
    idle_bytes: dict[str, int]
    full_bytes: dict[str, int]

    @property
    def bytes_a_stream(self) -> dict[str, float]:
        """Resident bytes that one stream adds, by part of the system; empty where none is open."""
        if not self.open_at_once:
            return {}
        return {
            part: (full - self.idle_bytes.get(part, 0)) / self.open_at_once
            for part, full in self.full_bytes.items()
        }


async def many_streams(
    systems: Sequence[System], model: str, *, streams: int, ramp_s: float, gap_s: float
) -> list[Held]:
    """Open `streams` at each system in turn, over `ramp_s`; each frame is due after `gap_s`.

    An answer is so long that the first stream is still open some time after the last has begun.
    """
    question = Question(model=model, tokens=round(ramp_s / gap_s) + _FRAMES_TOGETHER)
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
        open_at_once = sum(not task.done() for task in asked)
        answers = [answer for answer in await asyncio.gather(*asked) if answer is not None]
    longest_s = [max(answer.gaps_s, default=0.0) for answer in answers]
    return Held(
        system=system.name,
        streams=streams,
        open_at_once=open_at_once,
        completed=len(answers),
        stalled=sum(gap > 3 * gap_s for gap in longest_s),
        longest_gap_s=max(longest_s, default=0.0),
        idle_bytes=idle,
        full_bytes=full,
    )
