"""`comp-ai deploy` and `comp-ai rollback` before a stand-in for Serve."""

from __future__ import annotations

import asyncio
import io
import json
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import orjson
import pytest
import yaml
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema
from rich.console import Console

from deployments.check import check
from serve_app.deploy.door import Door
from serve_app.deploy.errors import DeployRefused, NotRolledBack, RolledBack
from serve_app.deploy.rollout import Rollout
from serve_app.errors import ConfigError
from serve_app.settings import PostgresSettings
from serve_app.stack.progress import Parts
from serve_app.stack.serve_api import ServeApi
from tests.integration.browser_stand_ins import serving
from tests.integration.command_line import COMP_AI, comp_ai_environment
from tests.integration.serve_stand_in import (
    ANSWERS_400,
    ANSWERS_500,
    FAILS,
    HANGS,
    KEY,
    REFUSED,
    SERVES,
    TOKEN,
    ServeStandIn,
    config_of,
)

OTHER = 99  # serves, too


@pytest.fixture
def serve() -> ServeStandIn:
    """A cluster on which something runs that serves."""
    stand_in = ServeStandIn()
    stand_in.put(config_of(SERVES))
    return stand_in


@pytest.fixture
def url(serve: ServeStandIn) -> Iterator[str]:
    with serving(serve.app()) as port:
        yield f"http://127.0.0.1:{port}"


# One change, and the way back.


async def changed(
    url: str, before: dict[str, Any] | None, after: dict[str, Any], **times: float
) -> None:
    """Bring `after` to the stand-in."""
    api = ServeApi(url, TOKEN)
    parts = Parts(Console(file=io.StringIO()))
    limits = {"timeout_s": 0.0, "smoke_timeout_s": 0.0} | times
    try:
        async with Door(url, KEY) as door:
            await Rollout(api, door, parts, **limits).change(before, after, asyncio.Event())
    finally:
        await api.close()


async def test_what_serves_stays(serve: ServeStandIn, url: str) -> None:
    await changed(url, config_of(SERVES), config_of(OTHER), timeout_s=20)
    assert serve.puts == [OTHER]


@pytest.mark.parametrize(
    ("fate", "reason"),
    [
        (FAILS, "the application fake failed: no such weights"),
        (REFUSED, "Serve refuses the config: not valid"),
        (ANSWERS_400, "/v1/completions answers 400 .*no such parameter"),
        (ANSWERS_500, "fake is not ready after 0 s: 502 .*engine failed"),
    ],
)
async def test_what_does_not_serve_is_taken_back(
    serve: ServeStandIn, url: str, fate: int, reason: str
) -> None:
    with pytest.raises(RolledBack, match=rf"{reason}.*What ran before serves again"):
        await changed(url, config_of(SERVES), config_of(fate), timeout_s=20)
    assert serve.puts == [fate, SERVES]
    assert serve.fate == SERVES


async def test_what_does_not_run_in_time_is_taken_back(serve: ServeStandIn, url: str) -> None:
    with pytest.raises(RolledBack, match=r"not running after 1 s: Model:fake\. What ran before"):
        await changed(url, config_of(SERVES), config_of(HANGS), timeout_s=1)
    assert serve.puts == [HANGS, SERVES]


async def test_what_ran_before_may_not_serve_either(serve: ServeStandIn, url: str) -> None:
    with pytest.raises(NotRolledBack, match=r"no such weights.*does not serve: .*engine failed"):
        await changed(url, config_of(ANSWERS_500), config_of(FAILS), timeout_s=20)
    assert serve.puts == [FAILS, ANSWERS_500]


async def test_a_first_deployment_has_nothing_to_go_back_to(serve: ServeStandIn, url: str) -> None:
    with pytest.raises(NotRolledBack, match="Nothing ran before"):
        await changed(url, None, config_of(FAILS), timeout_s=20)
    assert serve.puts == [FAILS]


async def test_a_key_that_is_refused_stops_it_before_anything_is_changed(url: str) -> None:
    async with Door(url, "another key") as door:
        with pytest.raises(DeployRefused, match=r"refuses the key .*401"):
            await door.check_key()


# The commands.


@dataclass
class Operator:
    """Types commands, at one installation."""

    serve: ServeStandIn
    url: str
    folder: Path
    settings: PostgresSettings

    @property
    def environment(self) -> dict[str, str]:
        """Of every command."""
        return comp_ai_environment(
            self.settings, COMP_AI_HOME=str(self.folder / "home"), COMP_AI_RAY_TOKEN=TOKEN
        )

    def words(self, command: str, *more: str) -> list[str]:
        """Return a command line that asks the stand-in."""
        key = self.folder / "key"
        key.write_text(KEY)
        place = ["--address", self.url, "--url", self.url, "--key-file", str(key)]
        return [str(COMP_AI), command, *more, *place]

    def file(self, config: dict[str, Any], name: str = "x.yaml") -> str:
        """Write `config`; return where."""
        file = self.folder / name
        file.write_text(yaml.safe_dump(config))
        return str(file)

    def runs(self, command: str, *more: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            self.words(command, *more),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def deploys(self) -> list[tuple[str, str, int | None]]:
        """Return source, outcome and what was restored, of every deployment."""
        done = subprocess.run(
            [COMP_AI, "deploys", "--json"], env=self.environment, capture_output=True, check=True
        )
        return [
            (Path(e["source"]).name, e["outcome"], e["restores"]) for e in json.loads(done.stdout)
        ]


@pytest.fixture
def operator(serve: ServeStandIn, url: str, tmp_path: Path, database: PostgresSettings) -> Operator:
    return Operator(serve, url, tmp_path, database)


async def acts(connection: asyncpg.Connection) -> list[tuple[str, str, Any]]:
    """Return what the audit log says of deployments."""
    rows = await connection.fetch(
        "select action, target, after from comp_ai.audit_log where action like 'deploy.%' "
        "order by seq"
    )
    return [(row["action"], row["target"], orjson.loads(row["after"])) for row in rows]


async def test_deploy_and_roll_back(operator: Operator, connection: asyncpg.Connection) -> None:
    file = operator.file(config_of(OTHER))
    planned = operator.runs("deploy", file, "--plan")
    assert planned.returncode == 3, planned.stderr
    assert "gateway: unchanged\nfake: restarted\n" in planned.stdout
    assert "Model:fake: restarted, 1 replica, new ones start before old ones stop" in planned.stdout
    assert "-    word_chars: 1\n" in planned.stdout
    assert "+    word_chars: 99\n" in planned.stdout
    assert operator.serve.puts == []

    done = operator.runs("deploy", file, "--yes")
    assert (done.returncode, operator.serve.puts) == (0, [OTHER]), done.stderr
    assert "deployment 2 serves" in done.stdout
    again = operator.runs("deploy", file, "--yes")
    assert (again.returncode, "nothing to change" in again.stdout) == (0, True), again.stderr

    back = operator.runs("rollback", "--yes")
    assert (back.returncode, operator.serve.puts) == (0, [OTHER, SERVES]), back.stderr
    assert operator.deploys() == [
        ("what ran", "served", None),
        ("x.yaml", "served", None),
        ("deployment 1", "served", 1),
    ]
    noted = await acts(connection)
    assert [(action, target) for action, target, _ in noted] == [
        ("deploy.start", "2"),
        ("deploy.end", "2"),
        ("deploy.start", "3"),
        ("deploy.end", "3"),
    ]
    assert noted[0][2]["changes"] == ["fake"]
    assert noted[-1][2] | {"outcome": "served", "restores": 1} == noted[-1][2]

    nowhere = operator.runs("rollback", "--yes")
    assert nowhere.returncode == 1
    assert "No earlier deployment is known" in nowhere.stderr
    forward = operator.runs("rollback", "--to", "2", "--yes")
    assert (forward.returncode, operator.serve.fate) == (0, OTHER), forward.stderr


async def test_a_failure_is_taken_back_and_told(
    operator: Operator, connection: asyncpg.Connection
) -> None:
    done = operator.runs("deploy", operator.file(config_of(FAILS)), "--yes")
    assert done.returncode == 1
    assert "no such weights. What ran before serves again." in done.stderr
    assert operator.deploys()[-1] == ("x.yaml", "rolled back", None)
    _, _, after = (await acts(connection))[-1]
    assert after["outcome"] == "rolled back"
    assert after["reason"].startswith("the application fake failed")


def test_a_wrong_config_is_refused_by_name_before_anything_is_changed(operator: Operator) -> None:
    config = config_of(OTHER)
    config["applications"][0]["deployments"][0]["user_config"]["deadline_s"] = -1
    done = operator.runs("deploy", operator.file(config), "--yes")
    assert (done.returncode, operator.serve.puts) == (2, [])
    assert "gateway.Gateway.user_config.deadline_s is -1" in done.stderr


def wrong_argument(config: dict[str, Any]) -> None:
    config["applications"][1]["args"]["sped"] = 1


def wrong_import(config: dict[str, Any]) -> None:
    config["applications"][1]["import_path"] = "deployments.fork_model:build"


def wrong_deployment(config: dict[str, Any]) -> None:
    config["applications"][1]["deployments"][0]["name"] = "Model:fak"


def wrong_option(config: dict[str, Any]) -> None:
    config["applications"][1]["deployments"][0]["max_ongoing_requests"] = 0


def wrong_application(config: dict[str, Any]) -> None:
    config["applications"][1]["name"] = "fork"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (wrong_argument, r"applications\.fake\.args\.sped is 1"),
        (wrong_import, r"applications\.fake\.import_path is 'deployments\.fork_model:build'"),
        (wrong_deployment, r"applications\.fake\.deployments\.name is 'Model:fak'.*Model:fake"),
        (wrong_option, "max_ongoing_requests is 0"),
        (wrong_application, r"Gateway\.user_config\.models\.0\.app is 'fake'.*fork"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_check_names_what_is_wrong(spoil: Any, words: str) -> None:
    config = config_of(SERVES)
    spoil(config)
    with pytest.raises(ConfigError, match=words):
        check(config)


def test_the_check_returns_what_serve_will_tell() -> None:
    config = config_of(SERVES)
    told = {}
    for name, app in kept_by_the_controller(config).items():
        read = ServeApplicationSchema.model_validate(app)
        told[name] = json.loads(read.model_dump_json(exclude_unset=True))
    assert {app["name"]: app for app in check(config)["applications"]} == told


def kept_by_the_controller(config: dict[str, Any]) -> dict[str, Any]:
    """Do as `ServeController.apply_config` before it writes the applications down."""
    schema = ServeDeploySchema.model_validate(config)
    for app in schema.applications:
        app.logging_config = app.logging_config or schema.logging_config
    return {app.name: app.model_dump(exclude_unset=True) for app in schema.applications}


def test_downtime_must_be_allowed(operator: Operator) -> None:
    file = operator.file(config_of(OTHER, surge=0))
    done = operator.runs("deploy", file, "--yes")
    assert (done.returncode, operator.serve.puts) == (1, [])
    assert "Model:fake has one replica, which is stopped before the next" in done.stderr
    done = operator.runs("deploy", file, "--yes", "--allow-downtime")
    assert (done.returncode, operator.serve.puts) == (0, [OTHER]), done.stderr


def test_without_a_terminal_nobody_is_asked(operator: Operator) -> None:
    done = operator.runs("deploy", operator.file(config_of(OTHER)))
    assert (done.returncode, operator.serve.puts) == (2, [])
    assert "--yes" in done.stderr


def test_what_was_changed_meanwhile_is_not_overwritten(operator: Operator) -> None:
    operator.serve.overtaken_by = config_of(OTHER)
    done = operator.runs("deploy", operator.file(config_of(7)), "--yes")
    assert (done.returncode, operator.serve.puts) == (1, [])
    assert "What runs was changed meanwhile" in done.stderr


def hanging(operator: Operator) -> subprocess.Popen[str]:
    """Start a deployment that comes to no end, and wait until it is under way."""
    process = subprocess.Popen(
        operator.words("deploy", operator.file(config_of(HANGS), "hangs.yaml"), "--yes"),
        env=operator.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert operator.serve.hanging.wait(100)
    return process


def test_told_to_stop_it_goes_back_and_another_waits_until_then(operator: Operator) -> None:
    process = hanging(operator)
    other = operator.runs("deploy", operator.file(config_of(OTHER)), "--yes")
    assert other.returncode == 1
    assert f"Another deployment is under way (process {process.pid})" in other.stderr
    process.send_signal(signal.SIGTERM)
    _, words = process.communicate(timeout=60)
    assert process.returncode == 130, words
    assert "told to stop. What ran before serves again." in words
    assert operator.serve.puts == [HANGS, SERVES]
    assert operator.deploys()[-1] == ("hangs.yaml", "rolled back", None)


def test_after_a_kill_rollback_finds_what_served(operator: Operator) -> None:
    process = hanging(operator)
    process.kill()
    process.communicate()
    assert operator.deploys()[-1] == ("hangs.yaml", "unfinished", None)
    done = operator.runs("rollback", "--yes")
    assert (done.returncode, operator.serve.puts) == (0, [HANGS, SERVES]), done.stderr
