"""The smaller parts of `up`: folder and lock, ports, logs, Serve's API, the Ray command."""

from __future__ import annotations

import os
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from deployments.flags import check_flags
from serve_app.accounts.sealing.master_keys import MasterKeys, new_master_key
from serve_app.cli import master_key
from serve_app.errors import ConfigError
from serve_app.settings import Settings, load_settings
from serve_app.stack import accounts
from serve_app.stack.home import AlreadyRunning, Home
from serve_app.stack.logs import LogFollower
from serve_app.stack.ports import NeededPort, check_free, pick_free
from serve_app.stack.ray_head import RayHead, RayWorker
from serve_app.stack.serve_api import DeployFailed, ServeApi, ServeAway, read_config
from serve_app.stack.up import Ready, describe


def _home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    home.prepare()
    return home


def test_the_folders_are_closed_to_others(tmp_path: Path) -> None:
    home = _home(tmp_path)
    for folder in (home.path, home.logs, home.run, home.issuer, home.ray_temp):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="COMP_AI_HOME"):
        Home(tmp_path / "file" / "home").prepare()


def test_a_second_up_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    home = _home(tmp_path)
    code = (
        "import sys; from pathlib import Path; from serve_app.stack.home import Home\n"
        "with Home(Path(sys.argv[1])).lock(): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(home.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert home.running_pid() == other.pid
        with pytest.raises(AlreadyRunning, match=str(other.pid)), home.lock():
            pass
        other.kill()
    # A killed holder holds nothing.
    assert home.running_pid() is None
    with home.lock():
        pass


def test_the_cluster_token_is_made_once_and_kept_private(tmp_path: Path) -> None:
    home = _home(tmp_path)
    token = home.make_ray_token()
    assert len(token) == 64
    assert home.make_ray_token() == token
    assert stat.S_IMODE(home.ray_token.stat().st_mode) == 0o600


def test_a_long_folder_gets_a_short_one_for_rays_sockets(tmp_path: Path) -> None:
    home = Home(tmp_path / ("x" * 80))
    socket_path = home.ray_temp / "session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
    assert len(os.fsencode(socket_path)) <= 107
    assert home.ray_temp != Home(tmp_path / ("y" * 80)).ray_temp
    assert Home(Path("/srv/cai")).ray_temp == Path("/srv/cai/ray")


def test_a_taken_port_names_its_setting_and_its_holder() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"COMP_AI_PORT is {port}.*process {os.getpid()}"):
            check_free([NeededPort("COMP_AI_PORT", "127.0.0.1", port)])


def test_one_port_for_two_parts_is_refused() -> None:
    port = pick_free(1)[0]
    with pytest.raises(ConfigError, match=r"COMP_AI_B is .* other than COMP_AI_A's"):
        check_free(
            [NeededPort("COMP_AI_A", "127.0.0.1", port), NeededPort("COMP_AI_B", "127.0.0.1", port)]
        )


def test_log_lines_are_copied_once_and_nothing_else(tmp_path: Path) -> None:
    got: list[str] = []
    follower = LogFollower(tmp_path, got.append)
    first = tmp_path / "worker-1.out"
    line = '{"action":"request","status":200}'
    first.write_text(f'{line}\nplain text "action":"request"\n{{"other":"action"}}\n{line[:9]}')
    follower.copy_new()
    assert got == [line]
    with first.open("a") as file:
        file.write(line[9:] + "\n")
    (tmp_path / "worker-2.out").write_text(f"{line}\n")
    (tmp_path / "worker-2.err").write_text(f"{line}\n")
    follower.copy_new()
    follower.copy_new()
    assert got == [line] * 3


def test_a_truncated_file_is_read_from_its_start(tmp_path: Path) -> None:
    got: list[str] = []
    follower = LogFollower(tmp_path, got.append)
    file = tmp_path / "worker-1.out"
    line = '{"action":"request"}'
    file.write_text(f"{line}\n{line}\n")
    follower.copy_new()
    file.write_text(f"{line}\n")
    follower.copy_new()
    assert len(got) == 3


def _ray(tmp_path: Path) -> RayHead:
    home = _home(tmp_path)
    service = load_settings({"COMP_AI_HOME": str(home.path), "COMP_AI_RAY_PORT": "7001"}).service
    return RayHead(home=home, service=service, project=Path("/project"))


def test_the_ray_head_is_ours_alone(tmp_path: Path) -> None:
    head = _ray(tmp_path)
    spec = head.spec({"POSTGRES_HOST": "/db"})
    command = " ".join(spec.command)
    for wanted in ("--block", "--node-ip-address=127.0.0.1", "--port=7001", "--num-cpus="):
        assert wanted in command
    assert "--dashboard-host=127.0.0.1" in command
    assert "--no-monitor" in command
    assert "--include-log-monitor=false" in command
    assert not spec.restart
    assert spec.env is not None
    assert spec.env["POSTGRES_HOST"] == "/db"


def test_the_ray_environment_has_the_token_and_no_other_cluster(tmp_path: Path) -> None:
    head = _ray(tmp_path)
    env = head.environment(
        {
            "RAY_ADDRESS": "elsewhere:1",
            "RAY_AUTH_TOKEN": "x",
            "VLLM_CPU_KVCACHE_SPACE": "4",
            "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.1",
        }
    )
    assert "RAY_ADDRESS" not in env
    assert "RAY_AUTH_TOKEN" not in env
    assert env["RAY_AUTH_MODE"] == "token"
    assert env["RAY_AUTH_TOKEN_PATH"] == str(head.home.ray_token)
    assert env["VLLM_CPU_KVCACHE_SPACE"] == "4"
    assert env["RAY_SERVE_CONTROL_LOOP_INTERVAL_S"] == "0.1"
    assert env["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert env["RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD"] == "0"
    assert env["RAY_SERVE_METRICS_EXPORT_INTERVAL_MS"] == "5000"
    check_flags(env)
    assert env["PYTHONPATH"].startswith("/project")


def test_what_haproxy_answers_is_written_where_it_is_on(tmp_path: Path) -> None:
    for on in ("true", "false"):
        home = _home(tmp_path / on)
        given = {"COMP_AI_HOME": str(home.path), "COMP_AI_HAPROXY": on}
        service = load_settings(given).service
        project = Path("/project")
        RayHead(home=home, service=service, project=project).spec({})
        assert any(home.haproxy.glob("*/503.http")) == (on == "true")
        RayWorker(home=home, service=service, project=project, head="head:7001").spec(0)
        assert any(home.haproxy.glob("*/503.http")) == (on == "true")


def test_a_head_in_a_container_is_reached_from_outside(tmp_path: Path) -> None:
    alone = _ray(tmp_path)
    head = RayHead(
        home=alone.home,
        service=alone.service,
        project=alone.project,
        node_address=None,
        dashboard_host="0.0.0.0",
    )
    command = head.spec({}).command
    assert "--dashboard-host=0.0.0.0" in command
    # By the address that Ray finds: 127.0.0.1 would be nobody to another container.
    assert not [word for word in command if word.startswith("--node-ip-address")]


def test_a_worker_joins_and_lets_replicas_finish(tmp_path: Path) -> None:
    alone = _ray(tmp_path)
    spec = RayWorker(
        home=alone.home, service=alone.service, project=alone.project, head="head:7001"
    ).spec(660)
    assert "--address=head:7001" in spec.command
    assert "--head" not in spec.command
    assert "--include-log-monitor=false" in spec.command
    assert spec.env is not None
    assert spec.env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == "660"
    assert spec.env["RAY_AUTH_TOKEN_PATH"] == str(alone.home.ray_token)
    check_flags(spec.env)
    assert spec.stop_timeout_s > 660


def test_flags_that_ray_lacks_are_named(tmp_path: Path) -> None:
    env = _ray(tmp_path).environment({})
    for name in (
        "RAY_SERVE_USE_GRPC_BY_DEFAULT",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP",
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH",
    ):
        with pytest.raises(ConfigError, match=f"{name} is None; allowed: {env[name]}"):
            check_flags({key: value for key, value in env.items() if key != name})


def test_the_config_gets_our_port(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("http_options: {port: 1, keep_alive_timeout_s: 7}\napplications: []\n")
    assert read_config(file, port=4000)["http_options"] == {
        "host": "127.0.0.1",
        "port": 4000,
        "keep_alive_timeout_s": 7,
    }


@pytest.mark.parametrize("text", ["a: [", "[]", "applications: 3", ""])
def test_a_config_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match="--config"):
        read_config(tmp_path / "c.yaml", port=1)


def test_a_config_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_config(tmp_path / "none.yaml", port=1)


def _api(answer: Callable[[httpx.Request], httpx.Response]) -> ServeApi:
    api = ServeApi("http://dashboard", "secret-token")
    api._http = httpx.AsyncClient(
        base_url="http://dashboard",
        transport=httpx.MockTransport(answer),
        headers=api._http.headers,
    )
    return api


def _applications(**statuses: str) -> dict[str, Any]:
    return {
        "applications": {
            name: {
                "status": status,
                "message": f"{name} says why",
                "deployments": {f"D-{name}": {"status": "UPDATING", "message": "loading"}},
            }
            for name, status in statuses.items()
        }
    }


async def test_waiting_says_which_deployments_are_missing_and_ends() -> None:
    states = iter(
        [_applications(a="DEPLOYING", b="RUNNING"), _applications(a="RUNNING", b="RUNNING")]
    )
    said: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        assert request.headers["authorization"] == "Bearer secret-token"
        return httpx.Response(200, content=orjson.dumps(next(states)))

    await _api(answer).wait_running(["a"], 10, said.append)
    assert said == ["D-a"]


async def test_a_failed_application_is_shown_with_serves_message() -> None:
    api = _api(lambda _: httpx.Response(200, json=_applications(a="DEPLOY_FAILED")))
    with pytest.raises(DeployFailed, match="a says why"):
        await api.wait_running(["a"], 10, lambda _: None)


async def test_a_refused_config_is_shown_with_serves_message() -> None:
    with pytest.raises(DeployFailed, match="extra field"):
        await _api(lambda _: httpx.Response(400, text="extra field")).deploy({})


async def test_a_dashboard_that_refuses_the_token_is_said() -> None:
    with pytest.raises(ServeAway, match="403"):
        await _api(lambda _: httpx.Response(403, text="Forbidden")).status()


def test_what_is_shown_can_be_pasted() -> None:
    text = "\n".join(describe(Ready(url="http://h:1", key="cai-k", model="m", took_s=2.4)))
    assert "cai-k" in text
    assert re.search(r"^curl http://h:1/v1/chat/completions ", text, re.MULTILINE)
    assert "/api/v1/comp-ai/v1" in text


# The master key.


def test_the_first_start_makes_a_master_key_and_the_next_ones_find_it(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.prepare()
    with pytest.raises(ConfigError, match="COMP_AI_MASTER_KEY"):
        accounts.master_keys_of(Settings(), home, {})
    named = accounts.master_key_environment(home, {})
    assert named == {"COMP_AI_MASTER_KEY_FILE": str(home.master_key)}
    assert stat.S_IMODE(home.master_key.stat().st_mode) == 0o600
    first = accounts.master_keys_of(Settings(), home, {}).ids
    assert accounts.master_key_environment(home, {}) == named
    assert accounts.master_keys_of(Settings(), home, {}).ids == first
    assert MasterKeys.of(load_settings(named).sealing).ids == first


def test_a_master_key_of_the_settings_is_taken_and_none_is_made(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.prepare()
    environ = {"COMP_AI_MASTER_KEY": new_master_key()}
    assert accounts.master_key_environment(home, environ) == {}
    assert not home.master_key.exists()
    assert accounts.master_keys_of(load_settings(environ), home, environ).ids


def test_a_new_master_key_stands_before_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = Home(tmp_path / "home")
    home.prepare()
    for name in ("COMP_AI_MASTER_KEY", "COMP_AI_MASTER_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    accounts.master_key_environment(home, {})
    [old] = accounts.master_keys_of(Settings(), home, {}).ids
    master_key.add_new(home)
    new, also = accounts.master_keys_of(Settings(), home, {}).ids
    assert (also, new in capsys.readouterr().out) == (old, True)
    home.master_key.write_text("no key")
    with pytest.raises(ConfigError):
        master_key.add_new(home)
    assert home.master_key.read_text() == "no key"


def test_a_new_master_key_is_printed_where_the_environment_holds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMP_AI_MASTER_KEY", new_master_key())
    master_key.add_new(Home(tmp_path))
    assert len(MasterKeys.parse(capsys.readouterr().out).ids) == 1
    assert list(tmp_path.iterdir()) == []
