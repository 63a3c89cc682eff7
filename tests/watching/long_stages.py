"""The failures that take minutes, or more of a stack than the short form has."""

from __future__ import annotations

import asyncio
import random
import shutil
import subprocess
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import asyncpg
import httpx

from serve_app.settings import PostgresSettings
from tests.chaos.faults import FullDisk, unmount
from tests.chaos.victims import kill_one
from tests.serve_configs import FAKE_MODEL, add_fake, suite_config
from tests.stack_runner import RunningStack, wait_until
from tests.watching.stages import PAIR, Scene, Stage, no_postgres
from tests.watching.traffic import asking, chat, start_batch

SLOW = "slow"
NARROW = "narrow"
HUGE = "huge"
REFUSED = "huge-refused"
_MIB = 1024 * 1024
SPOOL_DISK_BYTES = 96 * _MIB
# Above what the stage leaves free, so that it counts as full.
SPOOL_FREE_BYTES = 4 * _MIB
_LOCK_S = 7.0
_DISK_BYTES = 32 * _MIB


def watched_config(spool: Path) -> dict[str, Any]:
    """Return a Serve config with a model for each kind of trouble; the log's spools in `spool`."""
    config = suite_config(real_model=False, gateways=2)
    add_fake(config, PAIR, replicas=2)
    # Beyond the promise of 30 s.
    add_fake(config, SLOW, replicas=1, time_to_first_token_s=31.0)
    add_fake(config, NARROW, replicas=1)
    config["applications"][-1]["deployments"][0]["max_ongoing_requests"] = 1
    gateway = config["applications"][0]
    gateway["args"] = {
        "request_log": {"spool_folder": str(spool), "spool_min_free_bytes": SPOOL_FREE_BYTES}
    }
    policy = gateway["deployments"][0]["user_config"]
    policy["queue"] = {"max_waiting": 30}
    policy["limits"]["principals"]["saver"] = {"tokens_per_month": 1_000_000}
    return config


@contextmanager
def late_answers(scene: Scene) -> Iterator[None]:
    """Every first token comes after 31 s."""
    stack = scene.stack
    with asking(stack.url, stack.bootstrap, chat(SLOW), clients=30, apart_s=1.0):
        yield


@contextmanager
def no_backup(scene: Scene) -> Iterator[None]:
    """None was ever made; then one is."""
    yield
    scene.stack.cli("backup", "create")


@contextmanager
def standing_batch(scene: Scene) -> Iterator[None]:
    """A batch of one request, whose engine stops in the middle of the answer."""
    stack = scene.stack
    batch = start_batch(stack, chat(FAKE_MODEL, "[[stall_after=1]]", 5))
    yield
    url = f"{stack.url}/v1/batches/{batch}/cancel"
    httpx.post(url, headers=stack.bootstrap, timeout=30).raise_for_status()


@contextmanager
def little_memory(scene: Scene) -> Iterator[None]:
    """The host's exporter reads a /proc whose meminfo says that little is left."""
    proc = scene.watch.folder / "proc"
    proc.mkdir()
    for name in Path("/proc").iterdir():
        (proc / name.name).symlink_to(name)
    (proc / "meminfo").unlink()
    (proc / "meminfo").write_text("MemTotal: 1000000 kB\nMemAvailable: 20000 kB\n")
    scene.watch.end("node")
    scene.watch.start_node(proc)
    try:
        yield
    finally:
        scene.watch.end("node")
        scene.watch.start_node()


@contextmanager
def full_disk(scene: Scene) -> Iterator[None]:
    """A small ext4 disk of its own, mounted and filled."""
    image, folder = scene.watch.folder / "disk.img", scene.watch.folder / "disk"
    with image.open("wb") as file:
        file.truncate(_DISK_BYTES)
    folder.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, folder], check=True)
    try:
        _fill(folder)
        yield
    finally:
        unmount(folder)


def _fill(folder: Path) -> None:
    asyncio.run(FullDisk(folder).strike(random.Random(0)))


@contextmanager
def full_queue(scene: Scene) -> Iterator[None]:
    """Twice as many clients as the queues of both gateways take, of a model of one at a time."""
    stack = scene.stack
    body = chat(NARROW, tokens=60)
    with asking(stack.url, stack.bootstrap, body, clients=120, pause_s=1.0):
        yield


@contextmanager
def no_room(scene: Scene) -> Iterator[None]:
    """A model is deployed that asks for more CPUs than there are; clients ask for it."""
    stack = scene.stack
    before = stack.config()
    config = deepcopy(before)
    add_fake(config, HUGE, replicas=1)
    models = config["applications"][0]["deployments"][0]["user_config"]["models"]
    # The same by another name, for those who do not wait for its start.
    models.append({**models[-1], "name": REFUSED, "when_cold": "refuse"})
    config["applications"][-1]["deployments"][0]["ray_actor_options"] = {"num_cpus": 1000}
    stack.deploy(config)
    try:
        with (
            asking(stack.url, stack.bootstrap, chat(HUGE), clients=4, pause_s=0.5),
            asking(stack.url, stack.bootstrap, chat(REFUSED), pause_s=0.5),
        ):
            yield
    finally:
        stack.deploy(before)


@contextmanager
def full_log(scene: Scene) -> Iterator[None]:
    """Something else fills the disk of the spools."""
    disk = FullDisk(scene.stack.home / "disk")
    asyncio.run(disk.strike(random.Random(0)))
    try:
        with asking(scene.stack.url, scene.stack.bootstrap, chat(FAKE_MODEL), pause_s=0.5):
            yield
    finally:
        asyncio.run(disk.heal())


@contextmanager
def no_log(scene: Scene) -> Iterator[None]:
    """The request log is killed and cannot open its folder again."""
    spool = scene.stack.home / "disk" / "spool"
    away = spool.with_suffix(".away")
    spool.rename(away)
    spool.write_text("")
    _kill_replica(scene.stack, "request log")
    try:
        yield
    finally:
        spool.unlink()
        away.rename(spool)


def _kill_replica(stack: RunningStack, victim: str) -> None:
    assert kill_one(stack, victim, random.Random(0)), victim


@contextmanager
def no_partitions(scene: Scene) -> Iterator[None]:
    """Next month's partition is dropped, and the function that makes it is not there."""
    stack = scene.stack
    function = "comp_ai.ensure_partitions"
    [row] = stack.rows(
        "select format('comp_ai.%I', 'requests' || to_char(now() at time zone 'UTC'"
        " + interval '1 month', '\"_y\"YYYY\"m\"MM')) as name"
    )
    stack.rows(f"drop table {row['name']}")
    stack.rows(f"alter function {function}(date, integer) rename to not_there")
    # The hourly task is done at the start of the upkeep too.
    _kill_replica(stack, "request log")
    try:
        yield
    finally:
        stack.rows("alter function comp_ai.not_there(date, integer) rename to ensure_partitions")


@contextmanager
def drift(scene: Scene) -> Iterator[None]:
    """Somebody adds tokens to the rows of the log."""
    change = (
        "update comp_ai.requests set completion_tokens = completion_tokens + $1"
        " where created_at < $2 and replica_id is not null"
    )
    [now] = scene.stack.rows("select now()")
    scene.stack.rows(change, 1000, now[0])
    try:
        yield
    finally:
        scene.stack.rows(change, -1000, now[0])


@contextmanager
def failing_upkeep(scene: Scene) -> Iterator[None]:
    """A table of the usage is not there."""
    scene.stack.rows("alter table comp_ai.usage_minute rename to usage_away")
    try:
        yield
    finally:
        scene.stack.rows("alter table comp_ai.usage_away rename to usage_minute")


@contextmanager
def many_connections(scene: Scene) -> Iterator[None]:
    """Connections are opened until nine in ten and some more are taken."""
    with _meanwhile(lambda stop: _hold_connections(scene.stack.postgres.settings(), stop)):
        yield


@contextmanager
def slow_writes(scene: Scene) -> Iterator[None]:
    """Somebody locks the table of the requests, for 7 s each time, while clients ask."""
    stack = scene.stack
    with (
        _meanwhile(lambda stop: _lock_again_and_again(stack.postgres.settings(), stop)),
        asking(stack.url, stack.bootstrap, chat(FAKE_MODEL), pause_s=0.2),
    ):
        yield


@contextmanager
def _meanwhile(work: Callable[[threading.Event], Coroutine[Any, Any, None]]) -> Iterator[None]:
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(lambda: asyncio.run(work(stop)))
        try:
            yield
        finally:
            stop.set()
        working.result()


async def _connect(settings: PostgresSettings) -> asyncpg.Connection:
    assert settings.password is not None
    return await asyncpg.connect(
        host=settings.host,
        port=settings.port,
        user=settings.user,
        password=settings.password.get_secret_value(),
        database=settings.database,
    )


async def _hold_connections(settings: PostgresSettings, stop: threading.Event) -> None:
    held = [await _connect(settings)]
    most = int(await held[0].fetchval("show max_connections"))
    # The exporter counts none of PostgreSQL's own processes.
    count = "select count(*) from pg_stat_activity where backend_type = 'client backend'"
    try:
        while await held[0].fetchval(count) < 0.93 * most:
            held.append(await _connect(settings))
        await asyncio.to_thread(stop.wait)
    finally:
        for connection in held:
            await connection.close()


async def _lock_again_and_again(settings: PostgresSettings, stop: threading.Event) -> None:
    """Lock with two sessions in turn: between them a writer that waited gets its turn."""
    sessions = [await _connect(settings), await _connect(settings)]
    lock = "begin; lock table comp_ai.requests in exclusive mode"
    try:
        await sessions[0].execute(lock)
        while not await asyncio.to_thread(stop.wait, _LOCK_S):
            # Behind the writer, which waits already.
            following = asyncio.create_task(sessions[1].execute(lock))
            await asyncio.to_thread(stop.wait, 0.2)
            await sessions[0].execute("commit")
            await following
            sessions.reverse()
    finally:
        for session in sessions:
            await session.close()


@contextmanager
def long_outage(scene: Scene) -> Iterator[None]:
    """PostgreSQL answers nothing while many ask, and the journal of the limits is lost."""
    stack = scene.stack
    with no_postgres(scene):
        _kill_replica(stack, "limits")
        shutil.rmtree(stack.home / "limits")
        with asking(stack.url, stack.bootstrap, chat(FAKE_MODEL), clients=16, pause_s=0.02):
            yield


LATE = Stage(
    "late answers",
    ("CompAILatencyBurnFast", "CompAILatencyBurnSlow"),
    "a fake model whose first token comes after 31 s",
    late_answers,
    lasting=("CompAILatencyBurnFast", "CompAILatencyBurnSlow"),
)
NO_BACKUP = Stage(
    "no backup",
    ("CompAIBackupAway",),
    "none since the start; then `comp-ai backup create`",
    no_backup,
)
BATCH = Stage(
    "standing batch",
    ("CompAIBatchesStand",),
    "a batch whose engine stops in the middle of its only answer; then it is cancelled",
    standing_batch,
)
MEMORY = Stage(
    "little memory",
    ("CompAIHostMemory",),
    "prometheus-node-exporter reads a /proc whose meminfo says 2 % are left",
    little_memory,
)
DISK = Stage("full disk", ("CompAIDiskFull",), "an ext4 disk of 32 MiB, filled", full_disk)
QUEUE = Stage(
    "full queue",
    ("CompAIQueueLong", "CompAIQueueRefuses"),
    "120 clients ask a model of one request at a time; 60 may wait",
    full_queue,
)
NO_ROOM = Stage(
    "no room for a model",
    ("CompAIDeploymentStuck", "CompAINoReplicas", "CompAIModelNotReady", "CompAINotReady"),
    "a model that wants 1000 CPUs is deployed and asked for; then it is taken away",
    no_room,
)
LOG_FULL = Stage(
    "full log",
    ("CompAILogFull", "CompAIRecordsDropped"),
    "the disk of the spools, 96 MiB of memory, is filled, and clients ask",
    full_log,
)
NO_LOG = Stage(
    "no request log",
    ("CompAINoRequestLog", "CompAIDeploymentUnhealthy"),
    "the request log is killed, and its folder is a file",
    no_log,
)
PARTITIONS = Stage(
    "no partitions",
    ("CompAIPartitionsAhead",),
    "next month's partition is dropped, and the function that makes it renamed",
    no_partitions,
)
DRIFT = Stage(
    "drift", ("CompAIAccountingDrift",), "1000 tokens are added to each row of the log", drift
)
UPKEEP = Stage(
    "failing upkeep",
    ("CompAIUpkeepFails", "CompAIUpkeepLate"),
    "a table of the usage is renamed",
    failing_upkeep,
)
CONNECTIONS = Stage(
    "many connections",
    ("CompAIDatabaseConnections",),
    "93 % of PostgreSQL's connections are opened",
    many_connections,
)
WRITES = Stage(
    "slow writes",
    ("CompAIWritesSlow",),
    "the table of the requests is locked for 7 s again and again",
    slow_writes,
)
OUTAGE = Stage(
    "long outage",
    (
        "CompAIDatabaseDown",
        "CompAILogLag",
        "CompAISpoolGrows",
        "CompAIUpkeepAway",
        "CompAIBudgetsHeldBack",
    ),
    "PostgreSQL stopped (SIGSTOP) under load, and the limits killed without their journal",
    long_outage,
)


def gone_from_ready(stack: RunningStack) -> None:
    """Wait until the stack is whole again after a group of stages."""
    wait_until(stack.ready, "ready again", 120)
