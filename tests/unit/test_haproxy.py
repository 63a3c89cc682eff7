"""HAProxy's configuration as Serve writes it, put right: checked by HAProxy itself."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ray.serve._private import haproxy as of_serve
from ray.serve.config import HTTPOptions

from serve_app.errors import CompAIError, ConfigError
from serve_app.settings import ServiceSettings, load_settings
from serve_app.stack import haproxy, haproxy_launcher
from serve_app.stack.haproxy_launcher import Running, UnknownConfig, confined, running
from serve_app.stack.home import Home

_NODE = "a" * 56


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    home.prepare()
    haproxy.prepare(home)
    return home


def _service(home: Home, **settings: str) -> ServiceSettings:
    return load_settings({"COMP_AI_HOME": str(home.path)} | settings).service


def _written(folder: Path, *, gateways: int = 2, connections: int = 100) -> Path:
    """Have Serve write its configuration, as its manager on a node does."""
    folder = folder / _NODE
    config = of_serve.HAProxyConfig(
        socket_path=str(folder / haproxy_launcher.CONTROL),
        server_state_base=str(folder),
        server_state_file=str(folder / "state"),
        log_target="stdout format raw",
        maxconn=connections,
        metrics_enabled=False,
        http_options=HTTPOptions(host="127.0.0.1", port=3002),
        is_head=True,
    )
    api = of_serve.HAProxyApi(cfg=config, config_file_path=str(folder / "haproxy.cfg"))
    server = of_serve.ServerConfig
    backend = of_serve.BackendConfig(
        name="http-gateway",
        path_prefix="/",
        servers=[server(f"g{n}", "127.0.0.1", 30000 + n) for n in range(gateways)],
        fallback_server=server("own-proxy", "127.0.0.1", 3004),
    )
    api.set_backend_configs({"http-gateway": backend} if gateways else {})
    api._generate_config_file_internal()
    return folder / "haproxy.cfg"


@contextmanager
def _started(file: Path, files: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run HAProxy on what Serve wrote, without its door: no port is taken here."""
    confine = confined(file.read_text(), file.parents[1] / haproxy_launcher.ANSWERS)
    file.write_text(re.sub(r"frontend http_frontend\n(    .*\n)*", "", confine))
    command = [str(haproxy_launcher.binary()), "-db", "-f", str(file)]
    started = subprocess.Popen(
        ["prlimit", f"--nofile={files}:{files}", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        control = file.parent / haproxy_launcher.CONTROL
        deadline = time.monotonic() + 20
        while not haproxy_launcher._answers(control) and time.monotonic() < deadline:
            os.sched_yield()
        yield started
    finally:
        started.send_signal(signal.SIGKILL)
        started.wait()


@pytest.mark.parametrize("gateways", [0, 1, 3])
def test_haproxy_takes_what_is_left_of_serves_configuration(home: Home, gateways: int) -> None:
    file = _written(home.haproxy, gateways=gateways)
    launcher = [str(Path(sys.executable).parent / haproxy.LAUNCHER), "-c", "-f", str(file)]
    done = subprocess.run(launcher, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    text = file.read_text()
    assert re.findall(r"^\s*bind (.*)$", text, re.MULTILINE) == ["127.0.0.1:3002"]
    assert re.findall(r"stats socket .* mode (\d+)", text) == ["600"]
    assert "514" not in text
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(home.haproxy.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("was", "is_now"),
    [
        ("mode 666", "mode 777"),
        ("frontend prometheus", "frontend metrics"),
        ("listen stats", "listen statistics"),
        ("    errorfile 50", "    errors 50"),
        ("    bind 127.0.0.1:3002", "    bind 127.0.0.1:3002\n    bind *:80"),
        ("return status 404", "return status 403"),
    ],
)
def test_a_configuration_of_another_serve_is_refused(home: Home, was: str, is_now: str) -> None:
    text = _written(home.haproxy).read_text()
    confined(text, home.haproxy)
    with pytest.raises(UnknownConfig):
        confined(text.replace(was, is_now), home.haproxy)


def test_haproxys_own_answers_are_openai_errors() -> None:
    for status, content in haproxy.answers().items():
        head, body = content.split(b"\r\n\r\n", 1)
        first, *lines = head.decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        assert first.split(" ", 2)[:2] == ["HTTP/1.1", str(haproxy_launcher.ANSWERED[status])]
        assert headers["content-type"] == "application/json"
        assert int(headers["content-length"]) == len(body)
        error = json.loads(body)["error"]
        assert {"message", "type", "param", "code"} == error.keys()
        assert ("retry-after" in headers) == (" 503 " in first)


def test_the_environment_names_folders_of_ours_alone(home: Home) -> None:
    env = haproxy.environment(home, _service(home, COMP_AI_FALLBACK_PORT="7004"))
    assert env["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert env["RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"] == "7004"
    places = [value for value in env.values() if value.startswith("/")]
    launcher = env["RAY_SERVE_HAPROXY_BINARY_PATH"]
    assert os.access(launcher, os.X_OK)
    assert {Path(value) for value in places} - {Path(launcher)} <= {
        home.haproxy,
        *(home.haproxy / name for name in ("haproxy.cfg", "ctl", "state")),
    }
    # Serve reads every one of these, or it would mean nothing.
    source = Path(of_serve.__file__).with_name("constants.py").read_text()
    assert [name for name in env if f'"{name}"' not in source] == []


def test_a_gateway_leaves_only_after_nginxs_idle_connections_have_ended(home: Home) -> None:
    template = Path("k8s-free-compose/nginx/comp-ai.conf.template").read_text()
    [idle_s] = re.findall(r"^    keepalive_timeout (\d+)s;$", template, re.MULTILINE)
    env = haproxy.environment(home, _service(home))
    leaves_s = int(env["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"])
    assert int(idle_s) < leaves_s < int(env["RAY_SERVE_PORT_QUARANTINE_S"])
    # nginx passes on what fits into its buffers.
    [[count, size]] = re.findall(r"large_client_header_buffers (\d+) (\d+)k;", template)
    assert int(env["RAY_SERVE_HAPROXY_TUNE_BUFSIZE"]) > int(count) * int(size) * 1024 + 4096


def test_haproxy_starts_where_few_files_may_be_open(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = 1024
    monkeypatch.setattr(haproxy, "most_open_files", lambda: files)
    env = haproxy.environment(home, _service(home))
    file = _written(home.haproxy, connections=int(env["RAY_SERVE_HAPROXY_MAXCONN"]))
    with _started(file, files):
        assert haproxy_launcher._answers(file.parent / haproxy_launcher.CONTROL)


def test_gateways_take_ports_of_the_nodes_range(home: Home) -> None:
    env = haproxy.environment(home, _service(home, COMP_AI_NODE_PORTS="20000-20999"))
    assert env["RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"] == "20256"
    assert env["RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT"] == "20381"


def test_haproxy_can_be_switched_off(home: Home) -> None:
    off = _service(home, COMP_AI_HAPROXY="false")
    assert haproxy.environment(home, off) == {"RAY_SERVE_ENABLE_HA_PROXY": "0"}
    with pytest.raises(ConfigError, match="COMP_AI_HAPROXY"):
        load_settings({"COMP_AI_HAPROXY": "sometimes"})


def test_a_missing_haproxy_is_said_with_the_way_round_it(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(CompAIError, match="COMP_AI_HAPROXY=false"):
        haproxy.environment(home, _service(home))


def test_the_control_socket_fits_however_long_the_folders_name_is(tmp_path: Path) -> None:
    for length in (1, 20, 90):
        folder = Home(tmp_path / ("h" * length)).haproxy
        assert len(os.fsencode(folder / _NODE / haproxy_launcher.CONTROL)) <= 97


def test_a_haproxy_that_was_left_is_followed_and_another_ones_is_not(home: Home) -> None:
    file = _written(home.haproxy)
    with _started(file, 1024) as left:
        assert running(home.haproxy) == [Running(left.pid, file)]
        assert running(home.path / "other") == []
        follows = ["-sf", str(left.pid), "-x", str(file.parent / haproxy_launcher.CONTROL)]
        assert haproxy_launcher.taking_over(running(home.haproxy)) == follows
    assert haproxy_launcher.taking_over([Running(left.pid, file)]) == ["-sf", str(left.pid)]
