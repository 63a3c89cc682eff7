"""Ray on one machine, head or worker, by its command line: we are no part of the cluster.

`ray stop` is never used: it ends every Ray on the machine. Ours is a tree of processes below
`ray start --block`, and is ended as one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from serve_app.errors import CompAIError
from serve_app.settings import ServiceSettings
from serve_app.stack import haproxy
from serve_app.stack.home import Home
from serve_app.stack.ports import pick_free
from serve_app.stack.processes import ProcessSpec

_HOST = "127.0.0.1"
# Tokens go over HTTP, not through Ray's object store: the default of 30 % of the memory
# would only take it from the model.
_OBJECT_STORE_BYTES = 256 * 1024 * 1024
# Ray counts what applications ask for, not what they use. A model on the CPU asks for one and
# a fraction, and a small machine may have a second model, added while the first one runs.
_LEAST_CPUS = 4
_SESSIONS_KEPT = 3
_STOP_S = 20.0
# What every worker has and the head has not. What all requests need is placed by it: where the
# head is away, nobody replaces it.
WORKER_RESOURCE = "comp_ai_worker"
# Where the operator sets them to something else, that holds.
_UNLESS_SET = {
    # Our code never blocks its event loop, so Serve's part of a replica may share that loop:
    # six changes of thread less for a request, two for a token.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # At 0.1, its default, the controller looks for work ten times a second, and is the part of
    # an idle installation that costs most. It sees a dead replica by checks every 2 s anyway.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    # Ray hands its metrics on every 10 s, so Serve need not sum its own up ten times a second.
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "5000",
    # Ray's workers are the service here: at its default, 15, every other process of
    # the machine goes before the engine and the gateway.
    "RAY_worker_niceness": "0",
    # Without a bound vLLM takes a large share of the memory for its cache.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
}
# Another cluster of this machine must not be joined by accident.
_DROPPED = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD_ADDRESS")


@dataclass(frozen=True, slots=True, kw_only=True)
class RayHead:
    """How to start the head, and where it answers.

    `node_address` is by what other nodes reach it; Ray finds that out where it is None.
    `dashboard_host` is what the dashboard listens on. With a folder `store` the cluster and its
    applications outlive the head: the next one on the same folder takes them over.
    """

    home: Home
    service: ServiceSettings
    project: Path
    node_address: str | None = _HOST
    dashboard_host: str = _HOST
    store: Path | None = None

    @property
    def dashboard(self) -> str:
        """Address of the dashboard and of Serve's deploy API."""
        return f"http://{_HOST}:{self.service.dashboard_port}"

    @property
    def logs(self) -> Path:
        """Folder of the session that runs: the workers' stdout is there."""
        return _logs(self.home)

    def spec(self, extra: Mapping[str, str]) -> ProcessSpec:
        """Return the process to supervise; `extra` goes into every replica's environment.

        Raises:
            CompAIError: Ray is not installed.
        """
        self.home.make_ray_token()
        _tidy_sessions(self.home)
        if self.service.haproxy:
            haproxy.prepare(self.home)
        if self._store_folder is not None:
            self._store_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return ProcessSpec(
            name="ray",
            command=self._command(),
            log=self.home.logs / "ray.log",
            env={**self.environment(os.environ), **extra},
            stop_signal=signal.SIGTERM,
            stop_timeout_s=_STOP_S + self._drain_s,
            # Without a store everything of Serve goes with the head, and with one the start
            # that follows must deploy what is in the config by then.
            restart=False,
            # On a busy machine Ray gives up after 30 s, which cannot be set.
            attempts=3,
            # From a store applications come back before it is ready: see `RayWorker.spec`.
            own_session=self.store is not None,
        )

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """Return the environment of the head, which its workers inherit."""
        environment = node_environment(base, self.home, self.service, self.project)
        drained = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": f"{self._drain_s:g}"}
        return environment | drained | self._store_environment()

    @property
    def _drain_s(self) -> float:
        # Without a store the applications are drained and gone when the head is told to stop.
        return 0.0 if self.store is None else self.service.drain_s

    @property
    def _store_folder(self) -> Path | None:
        # Another release of Ray does not read it: it begins anew.
        return None if self.store is None else self.store / f"ray-{metadata.version('ray')}"

    def _store_environment(self) -> dict[str, str]:
        if (folder := self._store_folder) is None:
            return {}
        store = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(folder)}
        return store | _patience(self.service)

    def _command(self) -> list[str]:
        flags: dict[str, object] = {
            **_address_flag(self.node_address),
            "port": self.service.ray_port,
            **_head_ports(self.service),
            "include-dashboard": "true",
            "dashboard-host": self.dashboard_host,
            "dashboard-port": self.service.dashboard_port,
            "metrics-export-port": self.service.metrics_port,
            **_node_flags(self.home),
        }
        # Nobody adds nodes by Ray's autoscaler, whose monitor would only stand by.
        return _start_command(flags, "--head", "--no-monitor")


@dataclass(frozen=True, slots=True, kw_only=True)
class RayWorker:
    """How to start a node that joins the head at `head`, as host and port."""

    home: Home
    service: ServiceSettings
    project: Path
    head: str

    @property
    def logs(self) -> Path:
        """Folder of the session that runs: the workers' stdout is there."""
        return _logs(self.home)

    def spec(self, drain_s: float) -> ProcessSpec:
        """Return the process to supervise; told to stop, it lets replicas finish for `drain_s`.

        Raises:
            CompAIError: Ray is not installed.
        """
        _tidy_sessions(self.home)
        if self.service.haproxy:
            haproxy.prepare(self.home)
        drained = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": f"{drain_s:g}"}
        environment = node_environment(os.environ, self.home, self.service, self.project)
        return ProcessSpec(
            name="ray",
            command=self._command(),
            log=self.home.logs / "ray.log",
            env=environment | drained | _patience(self.service),
            stop_timeout_s=drain_s + _STOP_S,
            # The head may not be there yet, or be away: try again until it is.
            restart=True,
            # Ray's workers, and HAProxy, have groups of their own.
            own_session=True,
        )

    def _command(self) -> list[str]:
        flags: dict[str, object] = {
            **_address_flag(self.service.node_address),
            "address": self.head,
            "metrics-export-port": self.service.metrics_port,
            **_node_ports(self.service),
            "resources": json.dumps({WORKER_RESOURCE: 1}),
            **_node_flags(self.home),
        }
        return _start_command(flags)


def _patience(service: ServiceSettings) -> dict[str, str]:
    # A node whose head is away for longer ends itself, and with it the streams on it. Ray's
    # default is a minute: too short for a host that boots.
    return {"RAY_gcs_rpc_server_reconnect_timeout_s": f"{service.head_away_s:.0f}"}


def _logs(home: Home) -> Path:
    return home.ray_temp / "session_latest" / "logs"


def _head_ports(service: ServiceSettings) -> dict[str, object]:
    if (ports := service.node_ports) is not None:
        return _node_ports(service) | {"ray-client-server-port": ports.client_server}
    # Two fixed defaults of Ray (10001 and 52365) would meet those of another cluster.
    client_port, agent_port = pick_free(2)
    return {
        "ray-client-server-port": client_port,
        "dashboard-agent-listen-port": agent_port,
        "min-worker-port": 0,
        "max-worker-port": 0,
    }


def _node_ports(service: ServiceSettings) -> dict[str, object]:
    ports = service.node_ports
    if ports is None:
        return {}
    return {
        "node-manager-port": ports.node_manager,
        "object-manager-port": ports.object_manager,
        "runtime-env-agent-port": ports.runtime_env_agent,
        "dashboard-agent-listen-port": ports.dashboard_agent,
        "dashboard-agent-grpc-port": ports.dashboard_agent_grpc,
        "min-worker-port": ports.workers.start,
        "max-worker-port": ports.workers.stop - 1,
    }


def _address_flag(address: str | None) -> dict[str, object]:
    return {} if address is None else {"node-ip-address": address}


def _node_flags(home: Home) -> dict[str, object]:
    return {
        "temp-dir": home.ray_temp,
        "num-cpus": max(_LEAST_CPUS, len(os.sched_getaffinity(0))),
        "object-store-memory": _OBJECT_STORE_BYTES,
        "log-style": "record",
        # It sends what workers print to drivers, of which there are none; we read the files.
        "include-log-monitor": "false",
    }


def _start_command(flags: Mapping[str, object], *role: str) -> list[str]:
    options = [f"--{name}={value}" for name, value in flags.items()]
    return [str(_executable()), "start", *role, "--block", "--disable-usage-stats", *options]


def node_environment(
    base: Mapping[str, str], home: Home, service: ServiceSettings, project: Path
) -> dict[str, str]:
    """Return the environment of any node of the cluster: token, flags of Ray, folders."""
    env = {name: value for name, value in base.items() if name not in _DROPPED}
    path = [str(project), *filter(None, [env.get("PYTHONPATH")])]
    return {**_UNLESS_SET, **env} | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(home.ray_token),
        "RAY_USAGE_STATS_ENABLED": "0",
        # More than twice the leases a second, at half the gateway's CPU time.
        "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
        # With a loop of its own for the router, Serve's proxy takes whatever an answer has,
        # and keeps it: a client that does not read would not hold anything back.
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
        # Its default of 4 MiB would lose long answers, and the records of them.
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": "2147483647",
        # What Serve answers by itself comes in OpenAI's form, too.
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deployments.proxy:middlewares",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONPATH": os.pathsep.join(path),
        **haproxy.environment(home, service),
        "COMP_AI_HOME": str(home.path),
        "COMP_AI_MODEL_PATH": str(service.models_path),
    }


def _tidy_sessions(home: Home) -> None:
    sessions = sorted(home.ray_temp.glob("session_2*"), key=lambda path: path.name)
    for session in sessions[: -_SESSIONS_KEPT + 1]:
        shutil.rmtree(session, ignore_errors=True)
    # A session is gone on with where its head comes back, and Ray makes new sockets each time,
    # with longer and longer names.
    for left in home.ray_temp.glob("session_2*/sockets/*"):
        left.unlink(missing_ok=True)


def _executable() -> Path:
    # Beside our own Python first: another environment's Ray would be another version.
    beside = Path(sys.executable).parent / "ray"
    if beside.exists():
        return beside
    found = shutil.which("ray")
    if found is None:
        raise CompAIError("Ray is not installed: run `make setup`")
    return Path(found)
