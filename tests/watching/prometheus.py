"""Prometheus and its exporters from Debian, around one stack, with the project's own files."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from serve_app.stack import nginx
from tests.stack_runner import PROJECT, RunningStack, free_ports, wait_until
from tests.watching.certificates import write_certificate
from tests.watching.receiver import Page, Receiver
from tests.watching.scaled import FACTOR, write_scaled

MONITORING = PROJECT / "monitoring"
# Of Debian's packages of the same names.
_PROGRAMS = (
    "prometheus",
    "prometheus-alertmanager",
    "prometheus-blackbox-exporter",
    "prometheus-nginx-exporter",
    "prometheus-node-exporter",
    "prometheus-postgres-exporter",
)
# What a GPU's exporter tells; there is no GPU here, so a page stands in for it.
# The embedded nginx is built without its page of counters. This one is told in its place, for as
# long as that nginx answers.
_NGINX_PAGE = """\
Active connections: 1
server accepts handled requests
 10 10 10
Reading: 0 Writing: 1 Waiting: 0
"""
GPU_PAGE = """\
DCGM_FI_DEV_FB_USED{gpu="0"} %d
DCGM_FI_DEV_FB_FREE{gpu="0"} %d
DCGM_FI_DEV_GPU_UTIL{gpu="0"} 40
DCGM_FI_DEV_GPU_TEMP{gpu="0"} 50
"""
_READY_S = 60.0


def missing_programs() -> list[str]:
    """Return Debian's packages that are needed and not installed."""
    return [program for program in _PROGRAMS if shutil.which(program) is None]


def stack_settings() -> dict[str, str]:
    """Return what a stack that is watched needs in its environment."""
    # Ray forgets a gauge that is not set again for twice as long. The slowest of ours are set every
    # 5 s; an alert whose gauge comes and goes never fires.
    return {"RAY_metrics_report_interval_ms": "4000"}


@dataclass
class Watch:
    """Prometheus, what it reads, and whom it tells."""

    folder: Path
    url: str
    alertmanager_url: str
    receiver: Receiver
    gpu: Page
    ports: dict[str, int]
    # By the name of the exporter.
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    doors: list[nginx.Nginx] = field(default_factory=list)

    def ask(self, query: str) -> list[dict[str, Any]]:
        """Return the series that answer `query` now."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": query}, timeout=30)
        answer.raise_for_status()
        result: list[dict[str, Any]] = answer.json()["data"]["result"]
        return result

    def targets(self) -> dict[str, str]:
        """Return the health of each target, `up` where it is read, by its job."""
        answer = httpx.get(f"{self.url}/api/v1/targets", timeout=10).json()
        return {one["labels"]["job"]: one["health"] for one in answer["data"]["activeTargets"]}

    def trouble(self) -> list[str]:
        """Return what is told of those targets that are not read, for a person."""
        answer = httpx.get(f"{self.url}/api/v1/targets", timeout=10).json()
        bad = [one for one in answer["data"]["activeTargets"] if one["health"] != "up"]
        return [f"{one['scrapeUrl']}: {one['lastError']}" for one in bad]

    def firing(self) -> set[str]:
        """Return the names of the alerts that fire."""
        answer = httpx.get(f"{self.url}/api/v1/alerts", timeout=10).json()
        return {
            alert["labels"]["alertname"]
            for alert in answer["data"]["alerts"]
            if alert["state"] == "firing"
        }

    def start(self, name: str, *command: str | Path, env: Mapping[str, str] | None = None) -> None:
        """Start one program; its output goes into a file of the folder."""
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def end(self, name: str) -> None:
        """End one program."""
        process = self.processes.pop(name)
        # Not killed: the workers of an nginx would outlive it.
        process.terminate()
        process.wait(30)

    def start_blackbox(self) -> None:
        """Start what asks `/ready` and reads the certificate."""
        self.start(
            "blackbox",
            "prometheus-blackbox-exporter",
            f"--config.file={MONITORING / 'blackbox' / 'blackbox.yml'}",
            f"--web.listen-address=127.0.0.1:{self.ports['blackbox-exporter:9115']}",
        )

    def start_node(self, proc: Path = Path("/proc")) -> None:
        """Start what tells of the host, as `proc` has it."""
        self.start(
            "node",
            "prometheus-node-exporter",
            f"--web.listen-address=127.0.0.1:{self.ports['node-exporter:9100']}",
            f"--path.procfs={proc}",
        )

    def start_door(self, days: float) -> None:
        """Start an nginx whose certificate is good for so long; the stack's own has none."""
        certificate, key = self.folder / "door.pem", self.folder / "door.key"
        write_certificate(certificate, key, days=days)
        door = nginx.prepare(
            {
                "COMP_AI_NGINX_LISTEN": f"127.0.0.1:{self.ports['nginx:8080']}",
                "COMP_AI_NGINX_TLS_CERTIFICATE": str(certificate),
                "COMP_AI_NGINX_TLS_KEY": str(key),
            }
        )
        self.doors.append(door)
        self.start("door", *door.command)


@contextmanager
def watched(stack: RunningStack, folder: Path, factor: float = FACTOR) -> Iterator[Watch]:
    """Run Prometheus, Alertmanager and the exporters around `stack`, whose time is shorter."""
    with ExitStack() as ending:
        receiver = ending.enter_context(Receiver())
        gpu = ending.enter_context(Page(GPU_PAGE % (50, 50)))
        counters = ending.enter_context(
            Page(_NGINX_PAGE, told=lambda: _answers(f"{stack.url}/health"))
        )
        watch = _prepared(folder, receiver, gpu)
        ending.callback(_end_all, watch)
        _start_exporters(watch, stack, counters)
        write_scaled(MONITORING / "prometheus" / "rules", folder / "rules", factor)
        (folder / "prometheus.yml").write_text(configuration(watch, stack))
        (folder / "alertmanager.yml").write_text(alerting(watch))
        _start_servers(watch)
        wait_until(lambda: _answers(f"{watch.url}/-/ready"), "Prometheus", _READY_S)
        wait_until(lambda: _answers(f"{watch.alertmanager_url}/-/ready"), "Alertmanager", _READY_S)
        yield watch


def _prepared(folder: Path, receiver: Receiver, gpu: Page) -> Watch:
    names = ["prometheus", "alertmanager:9093", "nginx:8080", "node-exporter:9100"]
    names += ["nginx-exporter:9113", "postgres-exporter:9187", "blackbox-exporter:9115"]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    return Watch(
        folder=folder,
        url=f"http://127.0.0.1:{ports['prometheus']}",
        alertmanager_url=f"http://127.0.0.1:{ports['alertmanager:9093']}",
        receiver=receiver,
        gpu=gpu,
        ports=ports,
    )


def configuration(watch: Watch, stack: RunningStack) -> str:
    """Return the project's Prometheus configuration with the addresses of this stack."""
    text = (MONITORING / "prometheus" / "prometheus.yml").read_text(encoding="utf-8")
    here = {
        "comp-ai-service:8265": f"127.0.0.1:{stack.env['COMP_AI_DASHBOARD_PORT']}",
        "comp-ai-service:3002": f"127.0.0.1:{stack.env['COMP_AI_PORT']}",
        "/run/secrets/ray_token": str(stack.home / "run" / "ray-token"),
        "/etc/prometheus/rules": str(watch.folder / "rules"),
        "localhost:9090": f"127.0.0.1:{watch.ports['prometheus']}",
        **{name: f"127.0.0.1:{port}" for name, port in watch.ports.items() if ":" in name},
    }
    for name, address in here.items():
        assert name in text, f"prometheus.yml names no {name}"
        text = text.replace(name, address)
    return yaml.safe_dump(_quicker(yaml.safe_load(text), watch))


def _quicker(config: dict[str, Any], watch: Watch) -> dict[str, Any]:
    # A scrape may take as long as its interval, and a busy machine is slow.
    config["global"] = {"scrape_interval": "2s", "evaluation_interval": "1s"}
    for job in config["scrape_configs"]:
        job.pop("scrape_interval", None)
        for discovery in job.get("http_sd_configs", ()):
            discovery["refresh_interval"] = "1s"
        # No name server knows the GPU's exporter here.
        if job.pop("dns_sd_configs", None) is not None:
            job["static_configs"] = [{"targets": [f"127.0.0.1:{watch.gpu.port}"]}]
    return config


def alerting(watch: Watch) -> str:
    """Return the example's routes, which wait less, with one receiver for both."""
    file = MONITORING / "alertmanager" / "alertmanager.example.yml"
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    del config["global"]
    config["route"] |= {"group_wait": "1s", "group_interval": "1s"}
    config["receivers"] = [
        {
            "name": one["name"],
            "webhook_configs": [{"url": f"{watch.receiver.url}/{one['name']}"}],
        }
        for one in config["receivers"]
    ]
    return yaml.safe_dump(config)


def _start_exporters(watch: Watch, stack: RunningStack, counters: Page) -> None:
    watch.start_node()
    watch.start_blackbox()
    watch.start_door(days=90)
    watch.start(
        "nginx-exporter",
        "prometheus-nginx-exporter",
        f"-nginx.scrape-uri=http://127.0.0.1:{counters.port}/stub_status",
        f"-web.listen-address=127.0.0.1:{watch.ports['nginx-exporter:9113']}",
    )
    watch.start(
        "postgres-exporter",
        "prometheus-postgres-exporter",
        f"--web.listen-address=127.0.0.1:{watch.ports['postgres-exporter:9187']}",
        env={"DATA_SOURCE_NAME": _postgres_name(stack)},
    )


def _postgres_name(stack: RunningStack) -> str:
    found = stack.postgres.settings()
    assert found.password is not None
    words = {
        "host": found.host,
        "port": str(found.port),
        "user": found.user,
        "password": found.password.get_secret_value(),
        "dbname": found.database,
        "sslmode": "disable",
        # A server that stands still is one that does not answer.
        "connect_timeout": "2",
    }
    return " ".join(f"{name}={value}" for name, value in words.items())


def _start_servers(watch: Watch) -> None:
    watch.start(
        "alertmanager",
        "prometheus-alertmanager",
        f"--config.file={watch.folder / 'alertmanager.yml'}",
        f"--storage.path={watch.folder / 'alertmanager'}",
        f"--web.listen-address=127.0.0.1:{watch.ports['alertmanager:9093']}",
        "--cluster.listen-address=",
    )
    watch.start(
        "prometheus",
        "prometheus",
        f"--config.file={watch.folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={watch.folder / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{watch.ports['prometheus']}",
    )


def _end_all(watch: Watch) -> None:
    for process in watch.processes.values():
        process.terminate()
    for process in watch.processes.values():
        process.wait(30)
    for door in watch.doors:
        door.remove()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False
