"""The systems side by side; see `load_tests/bench/__init__.py` and docs/benchmarks.md.

    make bench
    .venv/bin/python -m load_tests.bench --engine fake --rounds 5 --only one-client

Systems run at the same time and are asked in turn. Writes `load_tests/results/bench_<engine>.md`
and the raw figures beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from load_tests.bench import report, scenarios, systems
from load_tests.bench.asking import Question
from load_tests.bench.report import Findings
from load_tests.bench.systems import Speed, System
from tests.serve_configs import FAKE_MODEL, REAL_MODEL

_QUICK = Speed(time_to_first_token_s=0.02, time_per_token_s=0.01)
# An answer that is there at once, after the 20 ms of a short non-streaming answer.
_AT_ONCE = Speed(time_to_first_token_s=0.02, time_per_token_s=0.0)
_SLOW = Speed(time_to_first_token_s=2.0, time_per_token_s=2.0)


@contextmanager
def _all(speed: Speed | None, given: argparse.Namespace) -> Iterator[list[System]]:
    """Start the engine alone and each system in front of one of its kind."""
    with ExitStack() as stack:
        bare = systems.bare_vllm() if speed is None else systems.bare_fake(speed)
        found = [stack.enter_context(bare)]
        if "comp-ai" in given.systems:
            found.append(stack.enter_context(systems.comp_ai(speed)))
        if "ray" in given.systems:
            found.append(stack.enter_context(systems.ray_serve_llm(speed)))
        if "litellm" in given.systems:
            model = FAKE_MODEL if speed else REAL_MODEL
            found.append(stack.enter_context(systems.litellm(found[0].door, model)))
        yield found


async def _fake(given: argparse.Namespace, findings: Findings) -> None:
    stream = Question(model=FAKE_MODEL, tokens=32)
    with _all(_QUICK, given) as found:
        await scenarios.warm(found, stream)
        findings.latencies = await scenarios.one_client(found, stream, rounds=40 * given.rounds)
        findings.throughputs["16 clients, streaming"] = await scenarios.many_clients(
            found, stream, clients=16, answers=160, rounds=given.rounds
        )
    whole = Question(model=FAKE_MODEL, tokens=8, stream=False)
    with _all(_AT_ONCE, given) as found:
        await scenarios.warm(found, whole)
        findings.throughputs["64 clients, not streaming, 20 ms"] = await scenarios.many_clients(
            found, whole, clients=64, answers=1500, rounds=given.rounds
        )
    slow = Question(model=FAKE_MODEL, tokens=20)
    with _all(_SLOW, given) as found:
        await scenarios.warm(found, Question(model=FAKE_MODEL, tokens=1))
        findings.held = await scenarios.many_streams(
            found[1:], slow, streams=given.streams, ramp_s=given.streams / 40, gap_s=2.0
        )


async def _real(given: argparse.Namespace, findings: Findings) -> None:
    question = Question(model=REAL_MODEL, tokens=64)
    with _all(None, given) as found:
        await scenarios.warm(found, question)
        findings.latencies = await scenarios.one_client(found, question, rounds=4 * given.rounds)
        findings.throughputs["16 clients, streaming"] = await scenarios.many_clients(
            found, question, clients=16, answers=48, rounds=given.rounds
        )


def _litellm_version() -> str | None:
    python = systems.LITELLM.parent / "python"
    if not python.exists():
        return None
    program = "from importlib.metadata import version; print(version('litellm'))"
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _more_files() -> None:
    """Allow the servers that are started from here two descriptors for each stream."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=("fake", "real"), default="fake")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--systems", default="comp-ai,ray,litellm", help="beside the bare engine")
    given = parser.parse_args(arguments)
    given.systems = given.systems.split(",")
    _more_files()
    if "litellm" in given.systems and not systems.has_litellm():
        systems.install_litellm()
    findings = Findings(engine=given.engine, load_before=os.getloadavg()[0])
    asyncio.run((_fake if given.engine == "fake" else _real)(given, findings))
    print(report.write(f"bench_{given.engine}", findings, _litellm_version()))


if __name__ == "__main__":
    main()
