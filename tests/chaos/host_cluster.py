"""Comp AI on several hosts: a head, workers, and a door with PostgreSQL and nginx."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import yaml

from serve_app.accounts.sealing.master_keys import new_master_key
from serve_app.settings import PostgresSettings
from serve_app.stack import nginx
from serve_app.stack.postgres import EmbeddedPostgres
from serve_app.stack.ray_head import WORKER_RESOURCE
from serve_app.stack.serve_api import ServeApi, ServeAway, read_config
from tests.chaos.hosts import DOOR, Host, bridge
from tests.serve_configs import FAKE_MODEL, keep_journals, suite_config
from tests.stack_runner import BOOTSTRAP_KEY, COMP_AI, wait_until

PORTS = range(20_000, 21_000)
TIME_PER_TOKEN_S = 0.03
_SERVE_PORT = 3002
_DOOR_PORT = 8080
_STARTED_S = 240
_TIMEOUT_S = 240
_POSTGRES_PORT = 5432


class HostCluster:
    """The running service, and what may be done to its hosts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._place = folder / "host"
        self._place.mkdir()
        self.journals = folder / "journals"
        self.journals.mkdir()
        self.hosts: dict[str, Host] = {}
        self.postgres = EmbeddedPostgres(folder / "database")
        self._token = secrets.token_hex(32)
        self._env = {
            **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
            "COMP_AI_HOME": str(self._place),
            "COMP_AI_API_KEY": BOOTSTRAP_KEY,
            "COMP_AI_MASTER_KEY": new_master_key(),
            "COMP_AI_RAY_TOKEN": self._token,
            "COMP_AI_NODE_PORTS": f"{PORTS.start}-{PORTS.stop - 1}",
            "COMP_AI_DRAIN_S": "30",
        }
        self._door: nginx.Nginx | None = None
        self._door_process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Address of nginx."""
        return f"http://{DOOR}:{_DOOR_PORT}"

    @property
    def bootstrap(self) -> dict[str, str]:
        """Headers of the bootstrap key."""
        return {"Authorization": f"Bearer {BOOTSTRAP_KEY}"}

    @property
    def spools(self) -> Sequence[Path]:
        """Folders of the spools, on the disk of each host."""
        return [host.disk / "spool" for host in self.hosts.values()]

    def gateway_of(self, name: str) -> str:
        """Address of the gateway on a host, past nginx."""
        return f"http://{self.hosts[name].address}:{_SERVE_PORT}"

    def said(self) -> str:
        """Return what the nodes wrote: the request lines of their gateways, too."""
        return "".join(host.said() for host in self.hosts.values())

    # The accounts.

    @contextmanager
    def postgres_runs(self) -> Iterator[None]:
        """Have PostgreSQL at the door, with a schema."""
        self.postgres.prepare()
        with (self.postgres.data_dir / "pg_hba.conf").open("a") as rules:
            rules.write("host all all 10.77.0.0/24 scram-sha-256\n")
        command = [*self.postgres.command(), "-c", f"listen_addresses={DOOR}"]
        user = self.postgres.user
        process = subprocess.Popen(command, user=user, group=user, stderr=subprocess.DEVNULL)
        try:
            asyncio.run(self.postgres.wait_ready(60))
            self._env |= self._postgres_environment()
            subprocess.run([COMP_AI, "migrate"], env=self._env, check=True, capture_output=True)
            yield
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)

    def _postgres_environment(self) -> dict[str, str]:
        settings = self.postgres.settings()
        return {
            "POSTGRES_HOST": DOOR,
            "POSTGRES_PORT": str(_POSTGRES_PORT),
            "POSTGRES_USER": settings.user,
            "POSTGRES_PASSWORD": _password(settings),
            "POSTGRES_DB": settings.database,
            "POSTGRES_SSLMODE": "disable",
        }

    def rows(self, query: str, *args: object) -> list[asyncpg.Record]:
        """Run a query in the accounts."""
        return asyncio.run(self._rows(query, *args))

    async def _rows(self, query: str, *args: object) -> list[asyncpg.Record]:
        settings = self.postgres.settings()
        connection = await asyncpg.connect(
            host=settings.host,
            port=settings.port,
            user=settings.user,
            password=_password(settings),
            database=settings.database,
        )
        try:
            return list(await connection.fetch(query, *args))
        finally:
            await connection.close()

    # Hosts.

    def start_head(self) -> None:
        """Switch the head on: the first time, or again on the same disk."""
        host = self._host("head")
        store = {"COMP_AI_RAY_STORE": f"{self._place}/ray-store"}
        config = str(self._place / "serve.yaml")
        self._start(host, ["head", "--config", config], store)

    def start_worker(self, name: str) -> None:
        """Switch a worker on."""
        head = f"{self.hosts['head'].address}:6379"
        self._start(self._host(name), ["worker"], {"COMP_AI_RAY_HEAD": head})

    def _start(self, host: Host, words: list[str], more: dict[str, str]) -> None:
        env = self._env | more | {"COMP_AI_NODE_ADDRESS": host.address}
        host.switch_on([str(COMP_AI), *words], env)

    def _host(self, name: str) -> Host:
        if name not in self.hosts:
            self.hosts[name] = Host(name, len(self.hosts), self._folder, self._place)
        return self.hosts[name]

    # What Serve runs.

    def write_config(self, hosts: int) -> dict[str, Any]:
        """Write the config for so many hosts to the head's disk, and return it."""
        config = _config(hosts, self.journals)
        (self._host("head").disk / "serve.yaml").write_text(yaml.safe_dump(config))
        return config

    def deploy(self, hosts: int) -> None:
        """Deploy the config for so many hosts on the head; do not wait."""
        self.write_config(hosts)
        file = self.hosts["head"].disk / "serve.yaml"
        asyncio.run(self._deploy(read_config(file, port=_SERVE_PORT, host="0.0.0.0")))

    async def _deploy(self, config: dict[str, Any]) -> None:
        api = self._api()
        try:
            await api.deploy(config)
        finally:
            await api.close()

    def _api(self) -> ServeApi:
        return ServeApi(f"http://{self.hosts['head'].address}:8265", self._token)

    def replicas(self, deployment: str) -> dict[str, str]:
        """Return the replicas of a deployment that run: id → name of the host."""
        return asyncio.run(self._replicas(deployment))

    async def _replicas(self, deployment: str) -> dict[str, str]:
        api = self._api()
        try:
            applications = (await api.status())["applications"].values()
        finally:
            await api.close()
        names = {host.address: host.name for host in self.hosts.values()}
        return {
            replica["replica_id"]: names[replica["node_ip"]]
            for application in applications
            for replica in application["deployments"].get(deployment, {}).get("replicas", [])
            if replica["state"] == "RUNNING" and replica["node_ip"] in names
        }

    def on_each(self, *names: str) -> bool:
        """Tell whether a gateway, a log and a model run on each of these hosts, and on no other."""
        try:
            found = [self.replicas(one) for one in ("Gateway", "RequestLog", f"Model:{FAKE_MODEL}")]
        except ServeAway:
            return False
        return all(sorted(one.values()) == sorted(names) for one in found)

    def wait_on_each(self, *names: str, timeout_s: float = _TIMEOUT_S) -> None:
        """Wait until `on_each`, and until the gateways there say that they are ready."""
        wait_until(lambda: self.on_each(*names), f"replicas on {', '.join(names)}", timeout_s)
        for name in names:
            wait_until(partial(self.ready, name), f"{name} is ready", timeout_s)

    def ready(self, name: str) -> bool:
        """Tell whether the gateway on a host says that completions work."""
        try:
            return httpx.get(f"{self.gateway_of(name)}/ready", timeout=10).status_code == 200
        except httpx.HTTPError:
            return False

    # The door.

    def open_door(self, *names: str) -> None:
        """Have nginx lead to the gateways on these hosts: a first time, or by a reload."""
        upstream = ",".join(f"{self.hosts[name].address}:{_SERVE_PORT}" for name in names)
        values = {
            "COMP_AI_NGINX_LISTEN": f"{DOOR}:{_DOOR_PORT}",
            "COMP_AI_NGINX_UPSTREAM": upstream,
            "COMP_AI_NGINX_RATE": "10000r/s",
            "COMP_AI_NGINX_BURST": "10000",
            "COMP_AI_NGINX_LOG": str(self._folder / "nginx-access.log"),
        }
        if self._door is None:
            self._door = nginx.prepare(values)
            with (self._folder / "nginx.log").open("wb") as log:
                self._door_process = subprocess.Popen(self._door.command, stderr=log)
            return
        assert self._door_process is not None
        rendered = nginx.render(nginx.TEMPLATE.read_text(), values)
        (self._door.work / "comp-ai.conf").write_text(rendered)
        self._door_process.send_signal(signal.SIGHUP)

    def close(self) -> None:
        """Switch everything off but PostgreSQL."""
        if self._door is not None and self._door_process is not None:
            self._door_process.terminate()
            self._door_process.wait(30)
            self._door.remove()
        for host in self.hosts.values():
            host.switch_off()


@contextmanager
def running_cluster(*workers: str) -> Iterator[HostCluster]:
    """Run a head and these workers; yield once completions come through the door."""
    with ExitStack() as stack:
        folder = tempfile.TemporaryDirectory(prefix="cai-", ignore_cleanup_errors=True)
        home = Path(stack.enter_context(folder))
        stack.enter_context(bridge())
        cluster = HostCluster(home)
        stack.enter_context(cluster.postgres_runs())
        stack.callback(cluster.close)
        cluster.write_config(1 + len(workers))
        started_s = time.monotonic()
        cluster.start_head()
        for name in workers:
            cluster.start_worker(name)
        cluster.wait_on_each("head", *workers, timeout_s=_STARTED_S)
        cluster.open_door("head", *workers)
        print(f"{1 + len(workers)} hosts serve after {time.monotonic() - started_s:.0f} s")
        yield cluster


def _config(hosts: int, journals: Path) -> dict[str, Any]:
    """Return a config for so many hosts, with the fake model, laid out as configs/cluster.yaml."""
    config = suite_config(real_model=False, gateways=hosts)
    keep_journals(config, journals)
    config["applications"][1]["args"]["speed"]["time_per_token_s"] = TIME_PER_TOKEN_S
    gateway, limits, log = config["applications"][0]["deployments"]
    [model] = config["applications"][1]["deployments"]
    for deployment in (gateway, log, model):
        deployment |= {"num_replicas": hosts, "max_replicas_per_node": 1}
    limits["ray_actor_options"]["resources"] = {WORKER_RESOURCE: 0.001}
    return config


def _password(settings: PostgresSettings) -> str:
    assert settings.password is not None
    return settings.password.get_secret_value()
