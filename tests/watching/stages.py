"""Failures, each staged on a running stack, and the alerts that must fire meanwhile."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import psutil

from tests.serve_configs import FAKE_MODEL
from tests.stack_runner import RunningStack, wait_until
from tests.watching.prometheus import GPU_PAGE, Watch
from tests.watching.traffic import asking, chat

# A model of two replicas, as `pair` of the chaos suite is.
PAIR = "pair"


@dataclass(frozen=True)
class Scene:
    """What is watched, and by whom."""

    stack: RunningStack
    watch: Watch


@dataclass(frozen=True)
class Stage:
    """One failure.

    Args:
        how: what is done, for the table of results.
        strike: breaks it on entry, mends it on exit.
        lasting: alerts that a mended failure keeps firing for the length of their window.
    """

    name: str
    alerts: tuple[str, ...]
    how: str
    strike: Callable[[Scene], AbstractContextManager[None]]
    lasting: tuple[str, ...] = ()


@dataclass
class Seen:
    """When an alert fired after its failure began, and when it stopped after the mending."""

    alert: str
    stage: str
    how: str
    fired_after_s: float | None = None
    resolved_after_s: float | None = None


@dataclass
class Play:
    """Stages that are struck together, and what was seen."""

    scene: Scene
    seen: dict[str, Seen] = field(default_factory=dict)
    lasting: set[str] = field(default_factory=set)

    def run(self, stages: Sequence[Stage], *, fire_s: float, resolve_s: float) -> None:
        """Strike all `stages`, wait for their alerts, mend, wait until none of them fires."""
        for stage in stages:
            for alert in stage.alerts:
                self.seen[alert] = Seen(alert, stage.name, stage.how)
        names = {alert for stage in stages for alert in stage.alerts}
        self.lasting |= {alert for stage in stages for alert in stage.lasting}
        with ExitStack() as mending:
            for stage in stages:
                mending.enter_context(stage.strike(self.scene))
            self._wait(names, fire_s, firing=True)
        self._wait(names - self.lasting, resolve_s, firing=False)

    def _wait(self, names: set[str], timeout_s: float, *, firing: bool) -> None:
        began = time.monotonic()
        left = set(names)
        while left and time.monotonic() - began < timeout_s:
            now = self.scene.watch.firing()
            for alert in left & now if firing else left - now:
                self._note(alert, time.monotonic() - began, firing=firing)
                left.discard(alert)
            time.sleep(0.5)

    def _note(self, alert: str, after_s: float, *, firing: bool) -> None:
        seen = self.seen[alert]
        if firing:
            seen.fired_after_s = round(after_s, 1)
        elif seen.fired_after_s is not None:
            seen.resolved_after_s = round(after_s, 1)

    @property
    def unresolved(self) -> list[str]:
        """Alerts that still fired when they should not, those that last excepted."""
        return [
            name
            for name, seen in self.seen.items()
            if seen.resolved_after_s is None and name not in self.lasting
        ]

    @property
    def unseen(self) -> list[str]:
        """Alerts that did not fire."""
        return [name for name, seen in self.seen.items() if seen.fired_after_s is None]


def _family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


@contextmanager
def standing_still(processes: Sequence[psutil.Process]) -> Iterator[None]:
    """Stop processes, without ending them."""
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


@contextmanager
def no_postgres(scene: Scene) -> Iterator[None]:
    """PostgreSQL answers nothing."""
    pid = scene.stack.postgres.running_pid()
    assert pid is not None
    with standing_still(_family(pid)):
        yield


@contextmanager
def no_door(scene: Scene) -> Iterator[None]:
    """The stack's nginx answers nothing."""
    [master] = scene.stack.processes("nginx: master")
    with standing_still([master, *master.children()]):
        yield


@contextmanager
def no_metrics(scene: Scene) -> Iterator[None]:
    """Ray's agent, which tells the metrics, answers nothing."""
    port = int(scene.stack.env["COMP_AI_METRICS_PORT"])
    with standing_still(listeners(port)):
        yield


def listeners(port: int) -> list[psutil.Process]:
    """Return the processes that listen on a port of this machine."""
    found = psutil.net_connections("tcp")
    pids = {
        one.pid
        for one in found
        if one.status == psutil.CONN_LISTEN and one.laddr and one.laddr[1] == port
    }
    return [psutil.Process(pid) for pid in pids if pid is not None]


@contextmanager
def no_exporter(scene: Scene) -> Iterator[None]:
    """The host's exporter is gone."""
    scene.watch.end("node")
    try:
        yield
    finally:
        scene.watch.start_node()


@contextmanager
def old_certificate(scene: Scene) -> Iterator[None]:
    """nginx has a certificate of five days, then one of 90."""
    scene.watch.end("door")
    scene.watch.start_door(days=5)
    try:
        yield
    finally:
        scene.watch.end("door")
        scene.watch.start_door(days=90)


@contextmanager
def failing_engine(scene: Scene) -> Iterator[None]:
    """Half of the requests get a 500 of the engine; replicas of a pair drop what they are asked."""
    stack = scene.stack
    error = chat(FAKE_MODEL, "[[error=500]]")
    dropped = chat(PAIR, "[[drop_after=0]]")
    with (
        asking(stack.url, stack.bootstrap, error, clients=2, pause_s=0.2),
        asking(stack.url, stack.bootstrap, chat(FAKE_MODEL), clients=2, pause_s=0.2),
        asking(stack.url, stack.bootstrap, dropped, clients=2, pause_s=0.3),
    ):
        yield


@contextmanager
def wrong_keys(scene: Scene) -> Iterator[None]:
    """Somebody asks with a key that nobody has."""
    headers = {"Authorization": "Bearer cai-" + "0" * 48}
    with asking(scene.stack.url, headers, chat(FAKE_MODEL), clients=3, pause_s=0.3):
        yield


@contextmanager
def full_gpu(scene: Scene) -> Iterator[None]:
    """The page of the GPU says that its memory is full."""
    scene.watch.gpu.text = GPU_PAGE % (995, 5)
    try:
        yield
    finally:
        scene.watch.gpu.text = GPU_PAGE % (50, 50)


@contextmanager
def old_backup(scene: Scene) -> Iterator[None]:
    """Every backup was made 30 hours earlier than it was, by its manifest."""
    scene.stack.cli("backup", "create")
    manifests = [*(scene.stack.home / "backups").glob("comp-ai-*.json")]
    assert manifests
    with ExitStack() as mending:
        for manifest in manifests:
            text = manifest.read_text()
            mending.callback(manifest.write_text, text)
            manifest.write_text(_aged(text))
        yield


def _aged(manifest: str) -> str:
    said = json.loads(manifest)
    created = datetime.fromisoformat(said["created_at"]) - timedelta(hours=30)
    return json.dumps(said | {"created_at": created.isoformat()})


DATABASE = Stage(
    "no PostgreSQL",
    ("CompAIDatabaseDown",),
    "every process of PostgreSQL stopped (SIGSTOP)",
    no_postgres,
)
DOOR = Stage("no nginx", ("CompAIDoorDown",), "nginx stopped (SIGSTOP)", no_door)
METRICS = Stage(
    "no metrics", ("CompAIMetricsAway",), "Ray's metrics agent stopped (SIGSTOP)", no_metrics
)
EXPORTER = Stage(
    "no exporter", ("CompAIExporterDown",), "prometheus-node-exporter ended", no_exporter
)
CERTIFICATE = Stage(
    "certificate ends",
    ("CompAICertificateExpires",),
    "an nginx of the same template beside the stack's, its certificate good for 5 days",
    old_certificate,
)
ENGINE = Stage(
    "failing engine",
    (
        "CompAIErrorRate",
        "CompAIAvailabilityBurnFast",
        "CompAIAvailabilityBurnSlow",
        "CompAIRetries",
    ),
    "the fake engine answers 500, and drops the connection before its first token",
    failing_engine,
    lasting=("CompAIAvailabilityBurnFast", "CompAIAvailabilityBurnSlow"),
)
SIGN_INS = Stage(
    "wrong keys", ("CompAISignInsFail",), "clients ask with a key that nobody has", wrong_keys
)
BACKUP = Stage(
    "old backup",
    ("CompAIBackupOld",),
    "a backup is made; its manifest is changed to 30 hours earlier",
    old_backup,
)
GPU = Stage(
    "full GPU", ("CompAIGpuMemory",), "told by a stand-in page: there is no GPU here", full_gpu
)
# Struck together, while clients are served.
SHORT = (EXPORTER, ENGINE, SIGN_INS, GPU)
# Nobody is served meanwhile, or nothing is told.
AWAY = (DOOR, DATABASE, METRICS)


def wait_healthy(watch: Watch) -> None:
    """Wait until every target is read, and those of the service are among them."""

    def healthy() -> bool:
        targets = watch.targets()
        return "comp-ai-service" in targets and set(targets.values()) == {"up"}

    wait_until(healthy, "every target is read", 60)
