"""The path of a request without Ray: what the gateway's code and the replica's door cost.

    .venv/bin/python -m load_tests.bench.alone --clients 32 --tokens 100 --rounds 5
    .venv/bin/python -m load_tests.bench.alone --clients 400 --tokens 40 --gap-s 1 --rounds 1

Two processes serve, a gateway and a replica with the fake engine; records, limits and leases are
plain objects in the gateway. Figures are CPU time, because that hardly depends on what else the
machine does, and resident memory for each stream that is open. With `--pause` the pids are
printed and nothing is asked before Enter: time to attach a profiler.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import uvloop

from load_tests.bench.asking import Door, Question, keep_asking
from load_tests.bench.cost import spending
from serve_app.completions.body import Defaults
from serve_app.completions.gateway import Gateway
from serve_app.completions.parts import Parts
from serve_app.completions.upstream import new_session
from serve_app.config import GatewayConfig, ModelEntry
from serve_app.contracts import Lease, LeaseGrant, LeaseHint, ModelState
from serve_app.fake_engine import FakeEngine, FakeEngineConfig
from serve_app.http_app import create_app
from serve_app.metrics import NoMetrics
from serve_app.queueing.pool import QueuedPool
from serve_app.read_pool import ReadPool
from serve_app.records import RequestRecord
from serve_app.replica import LeaseBook, LeaseDoor, ReplicaServer, Run, Slot
from serve_app.request_line import RequestLines
from serve_app.scaling.readings import FirstTokens
from serve_app.stored.vault import Vault
from tests.integration.fakes import AUTHORIZATION, BookKeeper, FakeAuthenticator, no_database
from tests.sealing import MASTERS, subject_keys

_MODEL = "small"
_HOST = "127.0.0.1"


class _Granted:
    """A lease of a replica that lets everybody in."""

    def __init__(self, address: str) -> None:
        self.grant = LeaseGrant(
            address=address, token=secrets.token_urlsafe(32), replica_id="replica-1"
        )

    def close(self) -> None:
        """Nothing is held."""


class _OneReplica:
    """Grants leases at once."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def open(self, model: ModelEntry, hint: LeaseHint) -> Lease:  # noqa: ARG002
        """See `ModelPool.open`."""
        return _Granted(self._address)

    async def state(self, model: ModelEntry) -> ModelState:  # noqa: ARG002
        """See `ModelPool.state`."""
        return ModelState.SERVING


class _EveryLease(LeaseBook):
    """Knows every token."""

    def find(self, token: str) -> Slot | None:
        """See `LeaseBook.find`."""
        return Slot(token=token)


class _NoLog:
    """Forgets records."""

    full = False

    async def append(self, record: RequestRecord) -> None:
        """See `RecordSink.append`."""


def _parts(address: str) -> Parts:
    database = no_database()
    return Parts(
        authenticator=FakeAuthenticator(),
        limits=BookKeeper(),
        models=QueuedPool(_OneReplica(address), NoMetrics()),
        log=_NoLog(),
        metrics=NoMetrics(),
        lines=RequestLines(Path(os.devnull).open("w")),
        session=new_session(),
        database=database,
        reports=ReadPool(database),
        defaults=Defaults(max_tokens=4096, temperature=0.7),
        masters=MASTERS,
        vault=Vault(subject_keys()),
    )


async def _serve(server: ReplicaServer) -> None:
    await server.start()
    print(server.address, flush=True)
    await asyncio.Event().wait()


async def _serve_gateway(address: str) -> None:
    model = {"name": _MODEL, "app": _MODEL, "max_tokens": 100_000}
    config = GatewayConfig.model_validate({"models": [model], "bodies": {"default": "full"}})
    gateway = Gateway(config, _parts(address))
    await _serve(ReplicaServer(create_app(lambda: gateway, list), _HOST))


async def _serve_replica(speed: FakeEngineConfig) -> None:
    engine = FakeEngine(speed)

    async def abort(run: Run) -> None:
        engine.abort(run.request_id)

    await _serve(ReplicaServer(LeaseDoor(engine.app(), _EveryLease(), abort, FirstTokens()), _HOST))


@contextmanager
def _serving(*role: str) -> Iterator[tuple[psutil.Process, str]]:
    """Run a server; yield its process and address."""
    command = [sys.executable, "-m", "load_tests.bench.alone", *role]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield psutil.Process(process.pid), process.stdout.readline().strip()
        finally:
            process.terminate()


async def _resident_meanwhile(processes: Sequence[psutil.Process], after_s: float) -> list[int]:
    await asyncio.sleep(after_s)
    return [process.memory_info().rss for process in processes]


async def _round(
    door: Door, question: Question, given: argparse.Namespace, served: list[psutil.Process]
) -> str:
    idle = [process.memory_info().rss for process in served]
    half_s = question.tokens * given.gap_s / 2
    meanwhile = asyncio.create_task(_resident_meanwhile(served, half_s))
    with spending(lambda: served[:1]) as by_gateway, spending(lambda: served[1:]) as by_replica:
        await keep_asking(door, question, clients=given.clients, answers=given.answers)
    full = await meanwhile
    parts = []
    spent_by = {"gateway": by_gateway, "replica": by_replica}
    for (name, spent), before, at in zip(spent_by.items(), idle, full, strict=True):
        each_ms = spent.total_s * 1000 / given.answers
        kib = (at - before) / 1024 / given.clients
        parts.append(
            f"{name} {each_ms:.3f} ms a request, {each_ms / question.tokens * 1000:.1f} ms a "
            f"1,000 tokens, {kib:.0f} KiB a stream"
        )
    return "; ".join(parts)


async def _measure(given: argparse.Namespace) -> None:
    question = Question(model=_MODEL, tokens=given.tokens, stream=not given.whole)
    speed = (str(given.first_s), str(given.gap_s))
    with (
        _serving("--replica", *speed) as (replica, engine),
        _serving("--gateway", engine) as (gateway, address),
    ):
        door = Door(url=f"http://{address}", headers=AUTHORIZATION)
        await keep_asking(door, Question(model=_MODEL, tokens=1), clients=4, answers=40)
        if given.pause:
            print(f"gateway {gateway.pid}, replica {replica.pid}")
            await asyncio.to_thread(sys.stdin.readline)
        for _ in range(given.rounds):
            print(await _round(door, question, given, [gateway, replica]), flush=True)


def main() -> None:
    """Serve, or measure what is served."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replica", nargs=2, type=float, metavar="SECONDS")
    parser.add_argument("--gateway", metavar="ENGINE")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--answers", type=int, default=0, help="as many as clients where 0")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--first-s", type=float, default=0.02)
    parser.add_argument("--gap-s", type=float, default=0.02)
    parser.add_argument("--whole", action="store_true", help="do not stream")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pause", action="store_true")
    given = parser.parse_args()
    given.answers = given.answers or given.clients
    if given.replica is not None:
        first_s, gap_s = given.replica
        work = _serve_replica(
            FakeEngineConfig(time_to_first_token_s=first_s, time_per_token_s=gap_s)
        )
    elif given.gateway is not None:
        work = _serve_gateway(given.gateway)
    else:
        work = _measure(given)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work)


if __name__ == "__main__":
    main()
