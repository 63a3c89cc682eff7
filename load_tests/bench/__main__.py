"""The systems side by side; see `load_tests/bench/__init__.py` and docs/load-testing.md.

    make bench
    .venv/bin/python -m load_tests.bench --engine fake --rounds 5 --systems comp-ai
    .venv/bin/python -m load_tests.bench --engine gpu --rounds 3
    .venv/bin/python -m load_tests.bench --engine ways

Systems run at the same time and are asked in turn. Writes `load_tests/results/bench_<engine>.md`
with a picture, and the raw figures beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager

import uvloop

from load_tests.bench import report, scenarios, systems
from load_tests.bench.asking import Question
from load_tests.bench.engines import Engine, cpu_engine, gpu_engine
from load_tests.bench.report import Findings
from load_tests.bench.scenarios import Throughput
from load_tests.bench.systems import Speed, System
from load_tests.bench.targets import STREAMING, WHOLE
from load_tests.ending import end_in_order
from load_tests.open_files import raise_file_limit
from tests.serve_configs import FAKE_MODEL

_QUICK = Speed(time_to_first_token_s=0.02, time_per_token_s=0.01)
# An answer that is there at once, after the 20 ms of a short non-streaming answer.
_AT_ONCE = Speed(time_to_first_token_s=0.02, time_per_token_s=0.0)
_SLOW = Speed(time_to_first_token_s=2.0, time_per_token_s=2.0)
# vLLM's processes look for work for a second without a pause, and then wait for it.
_SPINNING_S = 2.0
# Of the GPU: answers at each number of clients, some seconds' worth.
_LEVELS = {1: 4, 4: 16, 16: 64, 64: 192, 256: 512}


@contextmanager
def _all(engine: Speed | Engine, given: argparse.Namespace) -> Iterator[list[System]]:
    """Start the engine alone and each system in front of one of its kind."""
    with ExitStack() as stack:
        found = [stack.enter_context(one) for one in _with_own_engine(engine, given)]
        yield found + _in_front(stack, found[0], engine, given)


@contextmanager
def _all_together(engine: Engine, given: argparse.Namespace) -> Iterator[list[System]]:
    """Do as `_all` does, but start those with an engine of their own at the same time."""
    starting = _with_own_engine(engine, given)
    with ThreadPoolExecutor(len(starting)) as pool, ExitStack() as stack:
        started = [pool.submit(one.__enter__) for one in starting]
        wait(started)
        for one, entered in zip(starting, started, strict=True):
            if entered.exception() is None:
                stack.push(one)
        found = [entered.result() for entered in started]
        yield found + _in_front(stack, found[0], engine, given)


def _with_own_engine(
    engine: Speed | Engine, given: argparse.Namespace
) -> list[AbstractContextManager[System]]:
    bare = systems.bare_vllm(engine) if isinstance(engine, Engine) else systems.bare_fake(engine)
    starting: list[AbstractContextManager[System]] = [bare]
    if "comp-ai" in given.systems:
        starting.append(systems.comp_ai(engine))
    if "ray" in given.systems:
        starting.append(systems.ray_serve_llm(engine))
    return starting


def _in_front(
    stack: ExitStack, bare: System, engine: Speed | Engine, given: argparse.Namespace
) -> list[System]:
    if "litellm" not in given.systems:
        return []
    model = engine.model if isinstance(engine, Engine) else FAKE_MODEL
    return [stack.enter_context(systems.litellm(bare.door, model))]


async def _fake(given: argparse.Namespace, findings: Findings, save: Callable[[], str]) -> None:
    stream = Question(model=FAKE_MODEL, tokens=32)
    with _all(_QUICK, given) as found:
        await scenarios.warm(found, stream)
        findings.latencies = await scenarios.one_client(found, stream, rounds=40 * given.rounds)
        findings.throughputs[STREAMING] = await scenarios.many_clients(
            found, stream, clients=16, answers=160, rounds=given.rounds
        )
    save()
    whole = Question(model=FAKE_MODEL, tokens=8, stream=False)
    with _all(_AT_ONCE, given) as found:
        await scenarios.warm(found, whole)
        findings.throughputs[WHOLE] = await scenarios.many_clients(
            found, whole, clients=64, answers=1500, rounds=given.rounds
        )
    save()
    with _all(_SLOW, given) as found:
        await scenarios.warm(found, Question(model=FAKE_MODEL, tokens=1))
        findings.held = await scenarios.many_streams(
            found[1:], FAKE_MODEL, streams=given.streams, ramp_s=given.streams / 40, gap_s=2.0
        )


async def _real(given: argparse.Namespace, findings: Findings, save: Callable[[], str]) -> None:
    engine = cpu_engine()
    question = Question(model=engine.model, tokens=64)
    with _all(engine, given) as found:
        await scenarios.warm(found, question)
        findings.latencies = await scenarios.one_client(
            found, question, rounds=4 * given.rounds, rest_s=_SPINNING_S
        )
        save()
        rounds = scenarios.levels(found, question, answers={16: 48}, rounds=given.rounds)
        await _keep(rounds, findings, save)


async def _ways(given: argparse.Namespace, findings: Findings, save: Callable[[], str]) -> None:
    """Ask gateways that only carry answers, each by another way to the replica."""
    findings.notes.append(
        "The ways to the replica: nobody signs in, nothing is counted, there is no nginx. CPU is "
        "that of all parts, the model's replica too."
    )
    stream = Question(model=FAKE_MODEL, tokens=32)
    whole = Question(model=FAKE_MODEL, tokens=8, stream=False)
    with (
        systems.bare_fake(_QUICK) as bare,
        systems.carriers(_QUICK) as carriers,
        systems.ray_direct_streaming(_QUICK) as direct,
    ):
        found = [bare, direct, *carriers]
        await scenarios.warm(found, stream)
        findings.latencies = await scenarios.one_client(found, stream, rounds=20 * given.rounds)
        save()
        findings.throughputs[STREAMING] = await scenarios.many_clients(
            found, stream, clients=16, answers=160, rounds=given.rounds
        )
        save()
        findings.throughputs["64 clients, not streaming"] = await scenarios.many_clients(
            found, whole, clients=64, answers=640, rounds=given.rounds
        )


async def _gpu(given: argparse.Namespace, findings: Findings, save: Callable[[], str]) -> None:
    with gpu_engine() as engine, _all_together(engine, given) as found:
        # Weights that are made up find every token as likely: at random, they are mostly text.
        question = Question(model=engine.model, tokens=128, temperature=1)
        await scenarios.warm(found, question)
        async for _ in scenarios.levels(found, question, answers={256: 256}, rounds=1):
            pass
        findings.latencies = await scenarios.one_client(found, question, rounds=10 * given.rounds)
        save()
        rounds = scenarios.levels(found, question, answers=_LEVELS, rounds=given.rounds)
        await _keep(rounds, findings, save)


async def _keep(
    rounds: AsyncIterator[tuple[int, list[Throughput]]],
    findings: Findings,
    save: Callable[[], str],
) -> None:
    """Note and save each round, lest an end loses all."""
    async for clients, seen in rounds:
        findings.throughputs.setdefault(f"{clients} clients, streaming", []).extend(seen)
        save()


def _litellm_version() -> str | None:
    python = systems.LITELLM.parent / "python"
    if not python.exists():
        return None
    program = "from importlib.metadata import version; print(version('litellm'))"
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=("fake", "real", "gpu", "ways"), default="fake")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=2000)
    parser.add_argument("--systems", default="comp-ai,ray,litellm", help="beside the bare engine")
    parser.add_argument("--limit-min", type=float, default=120, help="ends itself after this")
    parser.add_argument("--note", action="append", default=[], help="a sentence for the report")
    given = parser.parse_args(arguments)
    given.systems = given.systems.split(",")
    end_in_order(given.limit_min * 60)
    raise_file_limit()
    compared = given.engine != "ways"
    if compared and "litellm" in given.systems and not systems.has_litellm():
        systems.install_litellm()
    findings = Findings(engine=given.engine, load_before=os.getloadavg()[0], notes=given.note)

    def save() -> str:
        return report.write(f"bench_{given.engine}", findings, _litellm_version())

    if given.engine == "gpu":
        # With hundreds of clients a plain event loop would be what is measured.
        uvloop.run(_gpu(given, findings, save))
    else:
        measure = {"fake": _fake, "real": _real, "ways": _ways}[given.engine]
        asyncio.run(measure(given, findings, save))
    print(save())


if __name__ == "__main__":
    main()
