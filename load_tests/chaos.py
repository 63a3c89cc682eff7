"""The loss contract on a whole stack: kills and other trouble at random moments under load.

    python -m load_tests.chaos --kills 200 --requests 20000 [--seed N] [--out FOLDER]

Starts PostgreSQL behind a link that can be cut, and `comp-ai up` with two gateways and the fake
engine. In each round processes are killed with SIGKILL while clients ask, and once something
else breaks: the link, the disk under the spool, or the clock of the gateways and of the log.
After each round three counts are compared: what clients saw, what the log holds, what the
engines counted. It ends with exit code 1 at the first round that does not add up. Everything it
started is gone at its end.

The clock needs libfaketime (Debian: `faketime`), named with `--faketime`. The full disk needs
root, who makes the spool's folder a small disk of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import secrets
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from serve_app.stack.postgres import EmbeddedPostgres
from serve_app.stack.processes import ProcessSpec, Supervisor
from tests.chaos.faults import (
    CutLink,
    Fault,
    FullDisk,
    MovedClock,
    SilentLink,
    mount_small_disk,
    unmount,
)
from tests.chaos.load import UNREACHED, Wishes
from tests.chaos.reconcile import Account, forget_counts, reconcile
from tests.chaos.storm import Storm, rage
from tests.chaos.victims import VICTIMS
from tests.integration.links import Link
from tests.serve_configs import FAKE_MODEL, keep_journals, suite_config
from tests.stack_runner import RunningStack, start_stack, wait_started, wait_until

RESULTS = Path(__file__).parent / "results"
WISHES = Wishes(tokens=(1, 12), leaving=0.1)
KILLS_A_ROUND = 10
_MIB = 1024 * 1024
SPOOL_BYTES = 32 * _MIB
# Kept for the requests that are under way when the disk fills.
SPOOL_FREE_BYTES = 4 * _MIB
_FAULT_S = (1.0, 5.0)
_READY_S = 180.0


@dataclass
class Totals:
    """Of all rounds until now."""

    seed: int
    kills: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    completed: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    left: int = 0
    rows: Counter[str] = field(default_factory=Counter)
    engine_tokens: int = 0
    log_tokens: int = 0
    unrecorded: int = 0
    unrecorded_tokens: int = 0
    given_up: int = 0
    given_up_tokens: int = 0
    cut_tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    took_s: float = 0.0

    @property
    def requests(self) -> int:
        """Requests that were asked, without those that reached no gateway."""
        return self.completed + self.failed.total() - self.failed[UNREACHED] + self.left

    def add(self, storm: Storm, account: Account) -> None:
        """Add one round."""
        self.rounds += 1
        self.kills += storm.kills
        for name, value in vars(account).items():
            setattr(self, name, getattr(self, name) + value)


@asynccontextmanager
async def own_postgres(home: Path) -> AsyncIterator[Link]:
    """Run a PostgreSQL that is started again where it dies; yield the link to it."""
    postgres = EmbeddedPostgres(home)
    await asyncio.to_thread(postgres.prepare)
    link = Link(postgres.settings())
    supervisor = Supervisor(home)
    try:
        await supervisor.start(
            ProcessSpec(
                name="postgres",
                command=postgres.command(),
                user=postgres.user,
                log=home / "postgres.log",
                before_restart=postgres.prepare,
            )
        )
        await postgres.wait_ready(60)
        await link.mend()
        yield link
    finally:
        await link.cut()  # else PostgreSQL would wait for its clients
        await supervisor.stop("postgres")
        await supervisor.close()


@asynccontextmanager
async def whole_stack(
    home: Path, database: Path, link: Link, journals: Path, clock: dict[str, str]
) -> AsyncIterator[RunningStack]:
    """Run `comp-ai up` at the other end of `link`.

    `clock` is for the environment of the gateways and of the log; Ray's own processes keep theirs.
    """
    config = suite_config(real_model=False, gateways=2)
    keep_journals(config, journals)
    _fit(config, clock)
    file = home / "serve.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    postgres = link.settings
    assert postgres.password is not None
    stack = start_stack(
        home,
        file,
        POSTGRES_HOST=postgres.host,
        POSTGRES_PORT=str(postgres.port),
        POSTGRES_USER=postgres.user,
        POSTGRES_PASSWORD=postgres.password.get_secret_value(),
        POSTGRES_DB=postgres.database,
        POSTGRES_SSLMODE="disable",
    )
    stack.postgres_home = database
    try:
        await asyncio.to_thread(wait_started, stack)
        yield stack
    finally:
        await asyncio.to_thread(stack.stop)


def _fit(config: dict[str, Any], clock: dict[str, str]) -> None:
    """Make the model quick, let the log do with a small disk, and give it a clock to be moved."""
    gateway = config["applications"][0]
    for deployment in gateway["deployments"]:
        if clock and deployment["name"] in ("Gateway", "RequestLog"):
            deployment["ray_actor_options"]["runtime_env"] = {"env_vars": clock}
    gateway["args"] = {"request_log": {"spool_min_free_bytes": SPOOL_FREE_BYTES}}
    [model] = [app for app in config["applications"] if app["name"] == FAKE_MODEL]
    model["args"]["speed"] |= {"time_to_first_token_s": 0.01, "time_per_token_s": 0.004}
    model["deployments"][0]["num_replicas"] = 2


async def one_round(
    stack: RunningStack,
    rng: random.Random,
    faults: Sequence[Fault],
    journals: Path,
    *,
    kills: int,
    requests: int,
    totals: Totals,
) -> None:
    """Kill, break, mend, compare, and add it to `totals`."""
    await asyncio.to_thread(wait_until, stack.ready, "ready before the round", _READY_S)
    forget_counts(journals)
    victims = [rng.choice([*VICTIMS]) for _ in range(kills)]
    between = max(1, requests // max(1, kills))
    trouble = asyncio.create_task(_trouble(rng, faults, totals))
    try:
        storm = await rage(
            stack, victims, rng, WISHES, between=between, at_the_end=between, in_all=requests
        )
    finally:
        trouble.cancel()
        await asyncio.wait([trouble])
    if not trouble.cancelled():
        trouble.result()
    await asyncio.to_thread(wait_until, stack.ready, "ready after the round", _READY_S)
    account = await asyncio.to_thread(reconcile, stack, storm, journals)
    totals.add(storm, account)
    print(f"round {totals.rounds}: {storm.kills.total()} kills {dict(storm.kills)}: {account}")
    print(f"    other trouble until now: {dict(totals.faults)}")
    for reason, times in account.failed.most_common():
        print(f"    {times} x {reason}")


async def _trouble(rng: random.Random, faults: Sequence[Fault], totals: Totals) -> None:
    """Break one thing at a random moment, and mend it; mended too where this is cancelled."""
    fault = rng.choice(faults)
    await asyncio.sleep(rng.uniform(0, 20))
    await fault.strike(rng)
    totals.faults[fault.name] += 1
    try:
        await asyncio.sleep(rng.uniform(*_FAULT_S))
    finally:
        await asyncio.shield(fault.heal())


async def run(arguments: argparse.Namespace) -> Totals:
    """Run rounds until there were enough kills and requests, or one did not add up."""
    totals = Totals(seed=arguments.seed)
    rng = random.Random(arguments.seed)
    # Apart, since `up` ends what it finds running of its own home.
    home, database, journals = (Path(tempfile.mkdtemp(prefix="cai-")) for _ in range(3))
    started_s = time.monotonic()
    async with AsyncExitStack() as stack:
        for folder in (home, database, journals):
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        link = await stack.enter_async_context(own_postgres(database))
        faults: list[Fault] = [CutLink(link), SilentLink(link)]
        if mount_small_disk(home / "spool", SPOOL_BYTES):
            stack.callback(unmount, home / "spool")
            faults.append(FullDisk(home / "spool"))
        environment = {}
        if arguments.faketime is not None:
            clock = MovedClock(arguments.faketime, home)
            faults.append(clock)
            environment = clock.environment
        print(f"seed {arguments.seed}; faults: {', '.join(fault.name for fault in faults)}")
        running = await stack.enter_async_context(
            whole_stack(home, database, link, journals, environment)
        )
        while not totals.wrong and not _enough(totals, arguments):
            kills = min(KILLS_A_ROUND, max(1, arguments.kills - totals.kills.total()))
            await one_round(
                running,
                rng,
                faults,
                journals,
                kills=kills,
                requests=arguments.requests * kills // arguments.kills,
                totals=totals,
            )
            totals.took_s = time.monotonic() - started_s
            if arguments.out is not None:
                write(totals, arguments.out)  # each round, lest an end before the time loses all
            print(
                f"    so far {totals.requests} requests, {totals.kills.total()} kills", flush=True
            )
    return totals


def _enough(totals: Totals, arguments: argparse.Namespace) -> bool:
    kills, requests = totals.kills.total(), totals.requests
    return bool(kills >= arguments.kills and requests >= arguments.requests)


def report(totals: Totals) -> str:
    """Return the totals as a table in Markdown."""
    rows = {
        "requests": f"{totals.requests}",
        "seen complete by their client": f"{totals.completed}",
        "failed at their client": ", ".join(f"{n} {why}" for why, n in totals.failed.most_common()),
        "left by their client": f"{totals.left}",
        "kills": f"{totals.kills.total()}",
        "by part": ", ".join(f"{n} {part}" for part, n in totals.kills.most_common()),
        "other trouble": ", ".join(f"{n} {name}" for name, n in totals.faults.most_common()),
        "rows by outcome": ", ".join(f"{n} {name}" for name, n in totals.rows.most_common()),
        "tokens by the engines": f"{totals.engine_tokens}",
        "tokens in the log": f"{totals.log_tokens}",
        "tokens of requests whose gateway was killed": (
            f"{totals.unrecorded_tokens} of {totals.unrecorded} requests"
        ),
        "tokens of requests that the log could not take": (
            f"{totals.given_up_tokens} of {totals.given_up} requests"
        ),
        "tokens of attempts that were cut": f"{totals.cut_tokens}",
        "lost, doubled or wrong": f"{len(totals.wrong)}",
    }
    lines = [f"| {name} | {value or 'none'} |" for name, value in rows.items()]
    head = (
        f"{platform.machine()}, 2 cores, 24 GiB, no GPU, Python {platform.python_version()}; "
        f"{totals.rounds} rounds in {totals.took_s / 60:.0f} min, seed {totals.seed}; two "
        "gateways, two replicas of the fake model, 16 clients, bodies full, durability sync."
    )
    return "\n".join([head, "", "| | |", "| --- | --- |", *lines, ""])


def write(totals: Totals, folder: Path) -> None:
    """Write the results as JSON and as Markdown."""
    raw = {
        name: dict(value) if isinstance(value, Counter) else value
        for name, value in vars(totals).items()
    }
    (folder / "chaos.json").write_text(json.dumps(raw, indent=2) + "\n")
    (folder / "chaos.md").write_text(report(totals))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**32))
    parser.add_argument("--faketime", type=Path, help="libfaketime.so.1; else no moved clock")
    parser.add_argument("--limit-min", type=float, default=120, help="ends itself after this")
    parser.add_argument("--out", type=Path, help=f"folder for results, as {RESULTS}")
    return parser.parse_args(arguments)


async def main() -> int:
    """Run it; return the exit code."""
    arguments = parse()
    async with asyncio.timeout(arguments.limit_min * 60):
        totals = await run(arguments)
    print(report(totals))
    for line in totals.wrong:
        print(f"wrong: {line}", file=sys.stderr)
    return 1 if totals.wrong else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
