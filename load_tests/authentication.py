"""What authentication adds to a request, by kind of credential.

    .venv/bin/python -m load_tests.authentication

Times `BearerAuthenticator.authenticate` itself, one call after the other, with a real PostgreSQL
and an issuer on a real port. The kinds take turns, so that a busy moment of the machine hits all.
Writes what it saw to `load_tests/results/`; the exit status tells whether the target was met.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from serve_app.audit.act import Actor
from serve_app.database import migrate
from serve_app.identity.api_keys import ApiKeyStore, KeyTerms
from serve_app.identity.authenticator import BearerAuthenticator, build_authenticator, build_pool
from serve_app.settings import Settings, load_settings
from tests.integration.conftest import MIGRATIONS, PostgresServer
from tests.integration.forge import EC_KEY, Issuer, good_claims, running_issuer, sign

RESULTS = Path(__file__).parent / "results"
TARGET_MS = 0.3
_WARM_CALLS = 200
_PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Call:
    """One call: how long it took, and how much of that this thread was computing."""

    wall_ms: float
    cpu_ms: float


@dataclass(frozen=True)
class Kind:
    """A kind of credential: each of `headers` is used in turn, `calls` times in all a round."""

    name: str
    headers: list[str]
    calls: int


@contextmanager
def _installation(issuer: Issuer) -> Iterator[Settings]:
    # A socket's path is limited to 107 bytes.
    home = Path(tempfile.mkdtemp(prefix="cai-"))
    server = PostgresServer(home)
    try:
        server.start()
        postgres = server.embedded.settings()
        asyncio.run(migrate(postgres, directory=MIGRATIONS))
        settings = load_settings({"COMP_AI_OIDC_ISSUER": issuer.url})
        yield settings.model_copy(update={"postgres": postgres})
    finally:
        server.stop()
        shutil.rmtree(home)


@asynccontextmanager
async def _authenticator(settings: Settings) -> AsyncIterator[BearerAuthenticator]:
    authenticator = build_authenticator(settings)
    authenticator.start()
    try:
        yield authenticator
    finally:
        await authenticator.close()


async def _new_key(settings: Settings) -> str:
    pool = build_pool(settings.postgres)
    try:
        by = Actor(id="benchmark", kind="cli")
        plain, _ = await ApiKeyStore(pool).create(KeyTerms(name="bench"), owner="ada", by=by)
        return plain
    finally:
        await pool.close()


def _tokens(issuer: Issuer, count: int, **how: Any) -> list[str]:
    return [sign(good_claims(issuer, jti=str(uuid.uuid4())), **how) for _ in range(count)]


def _kinds(issuer: Issuer, key: str, rounds: int, first_seen: int) -> list[Kind]:
    elliptic = {"key": EC_KEY, "alg": "ES256"}
    cached = 10 * first_seen
    return [
        Kind("API key, known", [key], cached),
        Kind("JWT, seen before", _tokens(issuer, 1), cached),
        Kind("JWT seen first, RS256", _tokens(issuer, rounds * first_seen), first_seen),
        Kind("JWT seen first, ES256", _tokens(issuer, rounds * first_seen, **elliptic), first_seen),
    ]


async def _measure(settings: Settings, kinds: list[Kind], rounds: int) -> dict[str, list[Call]]:
    """Return the calls by kind."""
    calls: dict[str, list[Call]] = {kind.name: [] for kind in kinds}
    async with _authenticator(settings) as authenticator:
        for kind in kinds:
            # Connections, the issuer's keys, the interpreter's caches.
            if len(kind.headers) == 1:
                for _ in range(_WARM_CALLS):
                    await authenticator.authenticate(f"Bearer {kind.headers[0]}")
        for _ in range(rounds):
            for kind in kinds:
                calls[kind.name] += await _time_calls(authenticator, kind)
    return calls


async def _time_calls(authenticator: BearerAuthenticator, kind: Kind) -> list[Call]:
    calls = []
    for _ in range(kind.calls):
        # A credential that is seen first is used once; the last one left stays.
        credential = kind.headers.pop() if len(kind.headers) > 1 else kind.headers[0]
        header = f"Bearer {credential}"
        begun, begun_cpu = time.perf_counter_ns(), time.thread_time_ns()
        await authenticator.authenticate(header)
        cpu, wall = time.thread_time_ns() - begun_cpu, time.perf_counter_ns() - begun
        calls.append(Call(wall / 1e6, cpu / 1e6))
        # As between requests: whoever waits may go on.
        await asyncio.sleep(0)
    return calls


def _percentile(times_ms: list[float], percent: int) -> float:
    return statistics.quantiles(times_ms, n=100, method="inclusive")[percent - 1]


def _report(calls: dict[str, list[Call]], rounds: int) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("pyjwt", "cryptography"))
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, "
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB, Python {platform.python_version()}"
    )
    lines = [
        f"{machine}, {packages}; {rounds} rounds, one call at a time, load average "
        f"{os.getloadavg()[0]:.1f}. Target: a median under {TARGET_MS} ms.",
        "",
        "| credential | calls | "
        + " | ".join(f"p{p}, ms" for p in _PERCENTILES)
        + " | CPU p50, ms |",
        "| --- | --- |" + " --- |" * (len(_PERCENTILES) + 1),
    ]
    for name, made in calls.items():
        taken_ms = [call.wall_ms for call in made]
        cells = [f"{_percentile(taken_ms, percent):.4f}" for percent in _PERCENTILES]
        cells.append(f"{statistics.median(call.cpu_ms for call in made):.4f}")
        lines.append(f"| {name} | {len(made)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and report; the exit status tells whether every median met the target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--first-seen", type=int, default=200, help="new tokens of a kind a round")
    given = parser.parse_args()
    with running_issuer() as issuer, _installation(issuer) as settings:
        key = asyncio.run(_new_key(settings))
        kinds = _kinds(issuer, key, given.rounds, given.first_seen)
        calls = asyncio.run(_measure(settings, kinds, given.rounds))
    report = _report(calls, given.rounds)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "authentication.md").write_text(report + "\n")
    raw = {
        name: {
            f"p{p}_ms": round(_percentile([call.wall_ms for call in made], p), 5)
            for p in range(1, 100)
        }
        for name, made in calls.items()
    }
    (RESULTS / "authentication.json").write_text(json.dumps(raw, indent=1) + "\n")
    print(report)
    medians_ms = (statistics.median(call.wall_ms for call in made) for made in calls.values())
    slow = [median_ms for median_ms in medians_ms if median_ms >= TARGET_MS]
    raise SystemExit(1 if slow else 0)


if __name__ == "__main__":
    main()
