"""`comp-ai head` and `comp-ai worker` as processes, before a stand-in for Ray's command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from serve_app.stack import haproxy
from serve_app.stack.ports import pick_free

PROJECT = Path(__file__).parents[2]
CONFIG = """\
applications:
  - name: gateway
    import_path: deployments.gateway:build
"""
# Takes Ray's place: Ray's version, Serve's deploy API, and a note of each request.
STAND_IN = """\
#!{python}
import http.server, json, os, sys
flags = dict(word[2:].split("=", 1) for word in sys.argv if word.startswith("--") and "=" in word)
notes = open({notes!r}, "a", buffering=1)
token = open(os.environ["RAY_AUTH_TOKEN_PATH"]).read()
print(json.dumps({{"start": sys.argv[1:], "token": token}}), file=notes)
if "--head" not in sys.argv:
    sys.stdin = None
    import signal
    signal.pause()
class Api(http.server.BaseHTTPRequestHandler):
    running = False
    def answer(self, body):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())
    def do_GET(self):
        apps = {{"gateway": {{"status": "RUNNING", "deployments": {{}}}}}} if Api.running else {{}}
        self.answer({{"applications": apps}})
    def do_PUT(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        print(json.dumps({{"deploy": body}}), file=notes)
        Api.running = True
        self.answer({{}})
    def do_DELETE(self):
        print(json.dumps({{"delete": True}}), file=notes)
        self.answer({{}})
    def log_message(self, *words):
        pass
http.server.HTTPServer((flags["dashboard-host"], int(flags["dashboard-port"])), Api).serve_forever()
"""


class Command:
    """The command line with a stand-in beside its Python."""

    def __init__(self, folder: Path) -> None:
        self.notes = folder / "notes"
        self.notes.touch()
        # Ray's command is looked for beside the Python that runs, so that one is ours too.
        programs = folder / "venv" / "bin"
        programs.mkdir(parents=True)
        (programs / "python").symlink_to(sys.executable)
        (folder / "venv" / "pyvenv.cfg").write_text((Path(sys.prefix) / "pyvenv.cfg").read_text())
        (folder / "venv" / "lib").symlink_to(Path(sys.prefix) / "lib")
        stand_in = programs / "ray"
        stand_in.write_text(STAND_IN.format(python=sys.executable, notes=str(self.notes)))
        stand_in.chmod(0o755)
        # Ray would start it; its being there is looked for.
        (programs / haproxy.LAUNCHER).symlink_to(Path(sys.executable).parent / haproxy.LAUNCHER)
        self.python = programs / "python"
        self.config = folder / "serve.yaml"
        self.config.write_text(CONFIG)
        port, ray, dashboard, metrics = pick_free(4)
        self.port = port
        self.env = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(PROJECT),
            "COMP_AI_HOME": str(folder / "home"),
            "COMP_AI_PORT": str(port),
            "COMP_AI_RAY_PORT": str(ray),
            "COMP_AI_DASHBOARD_PORT": str(dashboard),
            "COMP_AI_METRICS_PORT": str(metrics),
            "COMP_AI_RAY_TOKEN": "t" * 64,
            "POSTGRES_HOST": "db",
        }
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, *words: str, **changed: str | None) -> subprocess.Popen[str]:
        env = {k: v for k, v in (self.env | changed).items() if v is not None}
        process = subprocess.Popen(
            [str(self.python), "-c", "from serve_app.cli import main; main()", *words],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process

    def noted(self, what: str) -> list[Any]:
        lines = [json.loads(line) for line in self.notes.read_text().splitlines()]
        return [line for line in lines if what in line]


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    made = Command(tmp_path)
    yield made
    for process in made.processes:
        process.kill()
        process.communicate()


def _wait_until(true: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


def test_a_head_deploys_serves_and_drains_when_told_to_stop(command: Command) -> None:
    head = command.start("head", "--config", str(command.config))
    _wait_until(lambda: command.noted("deploy"), head)
    [deployed] = command.noted("deploy")
    # Of a container others must reach Serve; what stands in the file is for one machine.
    assert deployed["deploy"]["http_options"] == {"host": "0.0.0.0", "port": command.port}
    [started] = command.noted("start")
    assert started["token"] == "t" * 64
    assert "--head" in started["start"]
    head.send_signal(signal.SIGTERM)
    _, said = head.communicate(timeout=60)
    assert head.returncode == 0, said
    assert command.noted("delete")
    assert "stopped" in said


def test_a_head_whose_ray_dies_ends_so_that_its_container_starts_again(command: Command) -> None:
    head = command.start("head", "--config", str(command.config))
    _wait_until(lambda: command.noted("deploy"), head)
    for child in psutil.Process(head.pid).children():
        child.kill()
    _, said = head.communicate(timeout=60)
    assert head.returncode == 1
    assert "ray ended by itself" in said


def test_a_worker_joins_the_head_with_the_token(command: Command) -> None:
    worker = command.start("worker", COMP_AI_RAY_HEAD="head:6379")
    _wait_until(lambda: command.noted("start"), worker)
    [started] = command.noted("start")
    assert "--address=head:6379" in started["start"]
    assert started["token"] == "t" * 64
    worker.send_signal(signal.SIGTERM)
    _, said = worker.communicate(timeout=60)
    assert worker.returncode == 0, said


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        (["head", "--config", "serve.yaml"], "POSTGRES_HOST"),
        (["worker"], "COMP_AI_RAY_HEAD"),
        (["worker"], "COMP_AI_RAY_TOKEN"),
        (["worker"], "POSTGRES_HOST"),
    ],
)
def test_what_a_node_lacks_is_named(command: Command, words: list[str], missing: str) -> None:
    env = {"COMP_AI_RAY_HEAD": "head:6379"} | {missing: ""}
    words = [str(command.config) if word == "serve.yaml" else word for word in words]
    process = command.start(*words, **env)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert missing in said
