"""Runs `comp-ai up` for the e2e and chaos suites, as an operator would, and looks at it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import psutil
import yaml

from serve_app.accounts.bodies import Body, open_bodies
from serve_app.accounts.sealing.master_keys import MasterKeys
from serve_app.accounts.sealing.subject_keys import SubjectKeys
from serve_app.stack.postgres import EmbeddedPostgres
from serve_app.stack.serve_api import ServeApi, read_config

PROJECT = Path(__file__).resolve().parents[1]
COMP_AI = Path(sys.executable).parent / "comp-ai"
BOOTSTRAP_KEY = "bootstrap-key-of-the-test-stack-0123456789"
START_TIMEOUT_S = 600.0
PORTS = (
    "COMP_AI_HTTP_PORT",
    "COMP_AI_PORT",
    "COMP_AI_ISSUER_PORT",
    "COMP_AI_RAY_PORT",
    "COMP_AI_DASHBOARD_PORT",
    "COMP_AI_METRICS_PORT",
    "COMP_AI_FALLBACK_PORT",
)


@dataclass
class RunningStack:
    """One `comp-ai up` and the ways to look into it."""

    home: Path
    env: dict[str, str]
    process: subprocess.Popen[bytes]
    probe: subprocess.Popen[str] | None = None
    # Whose PostgreSQL it uses, where not its own.
    postgres_home: Path | None = None

    @property
    def postgres(self) -> EmbeddedPostgres:
        """The PostgreSQL of the accounts."""
        return EmbeddedPostgres(self.postgres_home or self.home)

    @property
    def spools(self) -> Sequence[Path]:
        """Folders of the spools of the request log."""
        return [self.home / "spool"]

    def said(self) -> str:
        """Return what `up` wrote."""
        return (self.home / "up.log").read_text(errors="replace")

    @property
    def url(self) -> str:
        """Address of nginx."""
        return f"http://127.0.0.1:{self.env['COMP_AI_HTTP_PORT']}"

    @property
    def serve_url(self) -> str:
        """Address of the Serve proxy behind nginx."""
        return f"http://127.0.0.1:{self.env['COMP_AI_PORT']}"

    @property
    def metrics_url(self) -> str:
        """Address of Ray's metrics."""
        return f"http://127.0.0.1:{self.env['COMP_AI_METRICS_PORT']}/metrics"

    @property
    def bootstrap(self) -> dict[str, str]:
        """Headers of the bootstrap key."""
        return {"Authorization": f"Bearer {BOOTSTRAP_KEY}"}

    def cli(self, *arguments: str) -> str:
        """Run a `comp-ai` command beside the stack and return its stdout."""
        done = subprocess.run(
            [COMP_AI, *arguments], env=self.env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def rows(self, query: str, *args: object) -> list[asyncpg.Record]:
        """Run a query in the accounts."""
        return asyncio.run(self._rows(query, *args))

    async def _rows(self, query: str, *args: object) -> list[asyncpg.Record]:
        async with self._connected() as connection:
            return list(await connection.fetch(query, *args))

    def bodies(self, rows: Sequence[asyncpg.Record]) -> list[Body | None]:
        """Open the texts of rows that have all columns of `request_bodies`."""
        return asyncio.run(self._bodies(rows))

    async def _bodies(self, rows: Sequence[asyncpg.Record]) -> list[Body | None]:
        masters = MasterKeys.parse((self.home / "keys" / "master.key").read_text())
        async with self._connected() as connection:
            return await open_bodies(connection, SubjectKeys(masters), rows)

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[asyncpg.Connection]:
        settings = self.postgres.settings()
        assert settings.password is not None
        connection = await asyncpg.connect(
            host=settings.host,
            port=settings.port,
            user=settings.user,
            password=settings.password.get_secret_value(),
            database=settings.database,
        )
        try:
            yield connection
        finally:
            await connection.close()

    def settled_rows(self, query: str, count: int, *args: object) -> list[asyncpg.Record]:
        """Wait until `query` gives `count` rows (they come through the spool), return them."""
        found: list[asyncpg.Record] = []

        def enough() -> bool:
            nonlocal found
            try:
                found = self.rows(query, *args)
            except (OSError, asyncpg.PostgresError):
                return False
            return len(found) >= count

        wait_until(enough, f"{count} rows", 60)
        return found

    def processes(self, title: str) -> list[psutil.Process]:
        """Return the stack's processes whose command line holds `title`."""
        return [p for p in descendants(self.process.pid) if title in _title(p)]

    def titles(self, part: str) -> list[str]:
        """Return the command lines of the stack's processes that hold `part`."""
        return [title for p in descendants(self.process.pid) if part in (title := _title(p))]

    def replicas(self, deployment: str) -> list[psutil.Process]:
        """Return the replica processes of a deployment."""
        return [p for p in self.processes("ray::ServeReplica:") if f":{deployment}" in _title(p)]

    def ready(self) -> bool:
        """Tell whether the gateway says that completions work."""
        try:
            return httpx.get(f"{self.url}/ready", timeout=10).status_code == 200
        except httpx.HTTPError:
            return False

    def engine(self, app: str) -> dict[str, Any]:
        """Return the engine's own counters of the model application `app`, now.

        Of one replica, and while another is busier, always of the idle one.
        """
        if self.probe is None:
            self.probe = start_driver(self.env, self.home / "run" / "ray-token", _PROBE)
        assert self.probe.stdin is not None
        assert self.probe.stdout is not None
        self.probe.stdin.write(f"{app}\n")
        self.probe.stdin.flush()
        counters: dict[str, Any] = json.loads(self.probe.stdout.readline())
        return counters

    def config(self) -> dict[str, Any]:
        """Return the Serve config that it was started with."""
        return read_config(self.home / "serve.yaml", port=int(self.env["COMP_AI_PORT"]))

    def deploy(self, config: dict[str, Any]) -> None:
        """Hand `config` to Serve, as `serve deploy` does; do not wait."""
        asyncio.run(self._deploy(config))

    async def _deploy(self, config: dict[str, Any]) -> None:
        token = (self.home / "run" / "ray-token").read_text().strip()
        api = ServeApi(f"http://127.0.0.1:{self.env['COMP_AI_DASHBOARD_PORT']}", token)
        try:
            await api.deploy(config)
        finally:
            await api.close()

    def stop(self) -> None:
        """Press Ctrl-C, wait for the end; raise TimeoutExpired where it had to be killed."""
        if self.probe is not None:
            self.probe.kill()
            self.probe.wait()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(180)
        except subprocess.TimeoutExpired:
            for process in descendants(self.process.pid):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.kill()
            raise


# Joins the cluster once and then answers at once: a new driver takes seconds.
_PROBE = """
import dataclasses, json, sys
import ray
from ray import serve
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
for line in sys.stdin:
    call = serve.get_app_handle(line.strip()).engine_counters.remote()
    print(json.dumps(dataclasses.asdict(call.result())), file=answers, flush=True)
"""
# Ray prints warnings of its own to a driver's output. They must not be read as answers.
_ANSWERS = """
import os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
"""


def start_driver(env: dict[str, str], token: Path, program: str) -> subprocess.Popen[str]:
    """Start a Python program that gets the cluster's address and may join it.

    What it prints to `answers`, and nothing else, is in `stdout`.
    """
    address = f"127.0.0.1:{env['COMP_AI_RAY_PORT']}"
    return subprocess.Popen(
        [sys.executable, "-c", _ANSWERS + program, address],
        env=env
        | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
            "PYTHONPATH": str(PROJECT),
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float) -> None:
    """Poll `condition`; fail the test where it does not come true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.05)


def descendants(pid: int) -> list[psutil.Process]:
    """Return all processes below `pid`."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def has_ended(process: psutil.Process) -> bool:
    """Return whether it runs no more, waited for by its parent or not."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def free_ports(count: int) -> list[int]:
    """Return ports that are free now.

    nginx takes its port minutes after this. Until then nobody else may be given it: the system
    hands out ports from 32768, Ray takes those from 10002 to 19999 for its workers and those
    from 30000 for gateways.
    """
    found: list[int] = []
    for port in random.sample(range(20_000, 30_000), 1000):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
        if len(found) == count:
            break
    return found


@contextmanager
def running_stack(config: dict[str, Any], **settings: str) -> Iterator[RunningStack]:
    """Start a stack of its own with the Serve config `config`; stop it at the end.

    The home is short: the paths of Unix sockets have 107 bytes.
    """
    with tempfile.TemporaryDirectory(prefix="cai-", ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        file = home / "serve.yaml"
        file.write_text(yaml.safe_dump(config, sort_keys=False))
        stack = start_stack(home, file, **settings)
        try:
            wait_started(stack)
            yield stack
        finally:
            stack.stop()


def models_path() -> Path:
    """Return the folder of the models, which the stacks of all tests share."""
    return Path(os.environ.get("COMP_AI_MODEL_PATH", "~/.comp-ai/models")).expanduser()


def start_stack(home: Path, config: Path | None, **settings: str) -> RunningStack:
    """Start `comp-ai up` with its data in `home`; do not wait."""
    ports = dict(zip(PORTS, map(str, free_ports(len(PORTS))), strict=True))
    env = os.environ | ports | {
        "COMP_AI_HOME": str(home),
        "COMP_AI_MODEL_PATH": str(models_path()),
        "COMP_AI_API_KEY": BOOTSTRAP_KEY,
        "COMP_AI_NGINX_RATE": "10000r/s",
        "COMP_AI_NGINX_BURST": "10000",
    } | settings  # fmt: skip
    command = [str(COMP_AI), "up", *(["--config", str(config)] if config else [])]
    output = (home / "up.log").open("wb")
    process = subprocess.Popen(
        command, env=env, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
    )
    return RunningStack(home=home, env=dict(env), process=process)


def wait_started(stack: RunningStack) -> None:
    """Wait until `up` says that it is ready."""
    log = stack.home / "up.log"

    def started() -> bool:
        text = log.read_text(errors="replace")
        assert stack.process.poll() is None, f"comp-ai up ended:\n{text[-4000:]}"
        return "Comp AI is ready" in text

    wait_until(started, f"a ready stack, see\n{log.read_text(errors='replace')}", START_TIMEOUT_S)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""
