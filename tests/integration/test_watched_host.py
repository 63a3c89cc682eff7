"""PostgreSQL, nginx and the host watched by the real Prometheus and exporters of Debian.

The service itself is a page here; `python -m load_tests.watch` has a whole stack.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from serve_app.stack import nginx
from tests.integration.conftest import PostgresServer
from tests.stack_runner import RunningStack, free_ports, wait_until
from tests.watching.dashboards import questions, without_data
from tests.watching.long_stages import MEMORY
from tests.watching.prometheus import missing_programs, watched
from tests.watching.receiver import Page
from tests.watching.stages import (
    CERTIFICATE,
    DATABASE,
    EXPORTER,
    GPU,
    Play,
    Scene,
    Stage,
    standing_still,
    wait_healthy,
)

pytestmark = pytest.mark.skipif(
    bool(missing_programs()), reason=f"not installed, of Debian: {', '.join(missing_programs())}"
)
# An hour is 18 s.
FACTOR = 200


@dataclass(frozen=True)
class Host:
    """What is watched, and how to break what is no part of `Scene`."""

    scene: Scene
    # Ray's answer to who asks for its nodes.
    nodes: Page
    door: psutil.Process

    @contextmanager
    def no_door(self, _: Scene) -> Iterator[None]:
        with standing_still([self.door, *self.door.children()]):
            yield

    @contextmanager
    def no_node(self, _: Scene) -> Iterator[None]:
        told, self.nodes.text = self.nodes.text, "[]"
        try:
            yield
        finally:
            self.nodes.text = told


@pytest.fixture
def host(own_server: PostgresServer, tmp_path: Path) -> Iterator[Host]:
    with ExitStack() as ending:
        gateway = ending.enter_context(Page("service_here 1\n"))
        told = json.dumps([{"targets": [f"127.0.0.1:{gateway.port}"], "labels": {"job": "ray"}}])
        nodes = ending.enter_context(Page(told, content_type="application/json", token="token"))
        [port] = free_ports(1)
        door = nginx.prepare(
            {
                "COMP_AI_NGINX_LISTEN": f"127.0.0.1:{port}",
                "COMP_AI_NGINX_UPSTREAM": f"127.0.0.1:{gateway.port}",
                "COMP_AI_NGINX_LOG": str(tmp_path / "access.log"),
            }
        )
        ending.callback(door.remove)
        process = subprocess.Popen(door.command, stderr=subprocess.DEVNULL)
        ending.callback(process.wait)
        ending.callback(process.terminate)
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "ray-token").write_text("token")
        stack = RunningStack(
            home=tmp_path,
            env={
                "COMP_AI_HTTP_PORT": str(port),
                "COMP_AI_PORT": str(gateway.port),
                "COMP_AI_DASHBOARD_PORT": str(nodes.port),
            },
            process=process,
            postgres_home=own_server.embedded.data_dir.parents[1],
        )
        folder = tmp_path / "watch"
        folder.mkdir()
        wait_until(stack.ready, "the door", 20)
        watch = ending.enter_context(watched(stack, folder, FACTOR))
        yield Host(Scene(stack, watch), nodes, psutil.Process(process.pid))


@pytest.mark.timeout(300)
def test_what_is_beside_the_service_is_watched(host: Host) -> None:
    watch = host.scene.watch
    wait_healthy(watch)
    jobs = {"comp-ai-service", "ready", "certificate", "nginx", "postgres", "host", "gpu"}
    assert watch.targets().keys() == jobs | {"prometheus"}

    asked = [question for question in questions() if question.dashboard == "host"]
    assert len(asked) > 15
    assert without_data(asked, watch, 60) == []

    play = Play(host.scene)
    door = Stage("no nginx", ("CompAIDoorDown",), "", host.no_door)
    node = Stage("no node", ("CompAIMetricsAway",), "", host.no_node)
    together = (DATABASE, CERTIFICATE, MEMORY, GPU, door, node)
    assert not watch.firing() & {alert for stage in together for alert in stage.alerts}
    play.run(together, fire_s=90, resolve_s=60)
    play.run([EXPORTER], fire_s=60, resolve_s=60)
    assert (play.unseen, play.unresolved) == ([], [])

    told = {
        ("pages", "CompAIDoorDown", "firing"),
        ("pages", "CompAIDoorDown", "resolved"),
        ("tickets", "CompAIHostMemory", "firing"),
    }
    wait_until(lambda: told <= watch.receiver.seen, "Alertmanager told its receivers", 30)
