"""A node of a cluster of several hosts: its ports, its store, and what it asks of Ray."""

from __future__ import annotations

import socket
from contextlib import nullcontext
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import cast

import httpx
import pytest
from rich.console import Console
from starlette.types import Receive, Scope, Send

from serve_app.errors import ConfigError
from serve_app.node_ports import NodePorts
from serve_app.replica import ReplicaServer
from serve_app.settings import load_settings
from serve_app.stack.cluster import Cluster
from serve_app.stack.home import Home
from serve_app.stack.logs import LogFollower
from serve_app.stack.node import Head
from serve_app.stack.processes import Supervisor
from serve_app.stack.progress import Parts
from serve_app.stack.ray_head import WORKER_RESOURCE, RayHead, RayWorker
from serve_app.stack.serve_api import NotRunning, ServeApi
from tests.serve_configs import shipped


def _in_cluster(tmp_path: Path, **settings: str) -> RayHead:
    home = Home(tmp_path / "home")
    home.prepare()
    given = {"COMP_AI_HOME": str(home.path), "COMP_AI_NODE_PORTS": "20000-20999"} | settings
    service = load_settings(given).service
    return RayHead(home=home, service=service, project=Path("/project"), node_address="10.0.0.1")


def test_a_node_takes_its_ports_from_its_range_alone(tmp_path: Path) -> None:
    head = _in_cluster(tmp_path)
    worker = RayWorker(
        home=head.home, service=head.service, project=head.project, head="10.0.0.1:6379"
    )
    for command in (head.spec({}).command, worker.spec(660).command):
        flags = dict(word[2:].split("=", 1) for word in command if "=" in word)
        ports = {name: int(value) for name, value in flags.items() if name.endswith("-port")}
        own = {name: port for name, port in ports.items() if 20000 <= port <= 20999}
        assert len(set(own.values())) == len(own)
        wanted = {"node-manager-port", "object-manager-port", "runtime-env-agent-port"}
        agents = {"dashboard-agent-listen-port", "dashboard-agent-grpc-port"}
        assert wanted | agents | {"min-worker-port", "max-worker-port"} <= own.keys()
        # The rest has a setting of its own.
        assert {ports[name] for name in ports.keys() - own.keys()} <= {6379, 8265, 8090}


def test_replicas_and_workers_of_ray_do_not_share_ports() -> None:
    ports = NodePorts.parse("20000-20099")
    single = {ports.node_manager, ports.object_manager, ports.runtime_env_agent}
    single |= {ports.dashboard_agent, ports.dashboard_agent_grpc, ports.client_server}
    parts = [single, set(ports.replicas), set(ports.gateways), set(ports.workers)]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 100


@pytest.mark.parametrize(
    "wrong", ["20000", "20000-20098", "1000-2000", "65500-65600", "b-a", "9-1"]
)
def test_a_range_of_ports_that_is_none_is_named(wrong: str) -> None:
    with pytest.raises(ConfigError, match="COMP_AI_NODE_PORTS"):
        load_settings({"COMP_AI_NODE_PORTS": wrong})


def test_a_head_with_a_store_is_found_again_by_its_workers(tmp_path: Path) -> None:
    alone = _in_cluster(tmp_path, COMP_AI_HEAD_AWAY_S="900")
    assert "RAY_gcs_storage" not in alone.environment({})
    kept = replace(alone, store=tmp_path / "store")
    env = kept.environment({})
    assert env["RAY_gcs_storage"] == "rocksdb"
    # A store of another release of Ray is not read.
    assert env["RAY_gcs_storage_path"] == f"{tmp_path}/store/ray-{metadata.version('ray')}"
    assert env["RAY_gcs_rpc_server_reconnect_timeout_s"] == "900"
    # The others go on: only what is on this node is drained, which takes its time.
    spec = kept.spec({})
    assert spec.env is not None
    assert spec.env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == "660"
    assert spec.stop_timeout_s > 660


def test_what_a_node_leaves_is_found_by_its_session(tmp_path: Path) -> None:
    alone = _in_cluster(tmp_path)
    worker = RayWorker(
        home=alone.home, service=alone.service, project=alone.project, head="10.0.0.1:6379"
    )
    assert worker.spec(660).own_session
    assert replace(alone, store=tmp_path / "store").spec({}).own_session
    # Beside nginx the kernel must not set it apart.
    assert not alone.spec({}).own_session


def test_a_head_with_a_store_names_its_address(tmp_path: Path) -> None:
    settings = load_settings({"COMP_AI_HOME": str(tmp_path), "COMP_AI_RAY_STORE": "/store"})
    with pytest.raises(ConfigError, match="COMP_AI_NODE_ADDRESS"):
        Head(settings, tmp_path / "serve.yaml", Parts(Console()))


def test_only_workers_have_what_the_shipped_cluster_asks_of_a_worker(tmp_path: Path) -> None:
    head = _in_cluster(tmp_path)
    worker = RayWorker(
        home=head.home, service=head.service, project=head.project, head="10.0.0.1:6379"
    )
    assert f'--resources={{"{WORKER_RESOURCE}": 1}}' in worker.spec(660).command
    assert not [word for word in head.spec({}).command if WORKER_RESOURCE in word]
    config = shipped("cluster")
    gateway = config["applications"][0]["deployments"]
    [limits] = [one for one in gateway if one["name"] == "Limits"]
    assert list(limits["ray_actor_options"]["resources"]) == [WORKER_RESOURCE]


def test_lines_of_before_are_not_told_again(tmp_path: Path) -> None:
    got: list[str] = []
    file = tmp_path / "worker-1.out"
    line = '{"action":"request"}'
    file.write_text(f"{line}\n")
    follower = LogFollower(tmp_path, got.append)
    follower.skip_present()
    with file.open("a") as more:
        more.write(f"{line}\n")
    follower.copy_new()
    assert got == [line]


async def test_a_replica_takes_a_free_port_of_its_range() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None: ...

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        full = ReplicaServer(app, "127.0.0.1", [port])
        with pytest.raises(OSError, match="no free port"):
            await full.start()
        other = ReplicaServer(app, "127.0.0.1", [port, port - 1])
        try:
            await other.start()
            assert other.address == f"127.0.0.1:{port - 1}"
        finally:
            await other.stop()


def _answering(body: dict[str, object]) -> ServeApi:
    api = ServeApi("http://dashboard", "token")
    api._http = httpx.AsyncClient(
        base_url="http://dashboard",
        transport=httpx.MockTransport(lambda _: httpx.Response(200, json=body)),
    )
    return api


async def test_replicas_are_counted_by_their_node() -> None:
    replicas = [{"node_ip": "10.0.0.1"}, {"node_ip": "10.0.0.2"}, {"node_ip": "10.0.0.1"}]
    api = _answering({"applications": {"a": {"deployments": {"d": {"replicas": replicas}}}}})
    assert await api.replicas_on("10.0.0.1") == 2
    await api.close()


@pytest.mark.parametrize("keeps", [True, False])
async def test_a_head_that_took_a_cluster_over_does_not_give_up_for_a_host_that_is_away(
    keeps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gateway has room on two of three hosts: the head must stay, and so must those two."""
    monkeypatch.setattr("serve_app.stack.cluster._MODEL_TIMEOUT_S", 0.01)
    head = replace(_in_cluster(tmp_path), store=tmp_path / "store" if keeps else None)
    config = {"applications": [{"name": "gateway"}]}
    # No process is started here, and a supervisor would end those of the tests.
    nobody = cast("Supervisor", None)
    cluster = Cluster(head, config, nobody, Parts(Console(stderr=True)))
    cluster._api = _answering({"applications": {"gateway": {"status": "DEPLOYING"}}})
    try:
        with nullcontext() if keeps else pytest.raises(NotRunning):
            await cluster.deploy()
    finally:
        await cluster._api.close()
