"""What a deployment would change, how it is shown, and which deployment is gone back to."""

from __future__ import annotations

import stat
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from serve_app.deploy.config import fingerprint
from serve_app.deploy.diff import told
from serve_app.deploy.history import Entry, History, Outcome, to_go_back_to
from serve_app.deploy.plan import Effect, Plan, make_plan
from serve_app.deploy.running import Running
from serve_app.errors import ConfigError

CONFIG: dict[str, Any] = {
    "http_options": {"port": 3002, "keep_alive_timeout_s": 75},
    "applications": [
        {
            "name": "gateway",
            "import_path": "deployments.gateway:build",
            "deployments": [
                {
                    "name": "Gateway",
                    "num_replicas": 1,
                    "max_surge_percent": 100,
                    "user_config": {"deadline_s": 600},
                },
                {"name": "Limits", "num_replicas": 1},
            ],
        },
        {
            "name": "m",
            "import_path": "deployments.model:build",
            "args": {"name": "m", "engine": {"max_num_seqs": 64}},
            "runtime_env": {"env_vars": {"TOKEN": "hunter2"}},
            "deployments": [{"name": "Model:m", "ray_actor_options": {"num_cpus": 1}}],
        },
    ],
}
BUILT = {"gateway": {"Gateway": 0, "Limits": 0, "RequestLog": 0}, "m": {"Model:m": 0}}


def status_of(config: dict[str, Any], **replicas: int) -> dict[str, Any]:
    """Return what Serve says while `config` runs, with one replica of each deployment."""
    applications = {}
    for app in config["applications"]:
        names = BUILT.get(app["name"], {})
        applications[app["name"]] = {
            "status": "RUNNING",
            "deployed_app_config": app,
            "deployments": {name: {"target_num_replicas": replicas.get(name, 1)} for name in names},
        }
    return {"applications": applications, "http_options": config["http_options"]}


def planned(after: dict[str, Any], built: Any = BUILT, **replicas: int) -> Plan:
    """Return the plan of going from CONFIG to `after`."""
    return make_plan(CONFIG, after, built, status_of(CONFIG, **replicas))


def effects(plan: Plan) -> dict[str, Effect]:
    """Return what happens, by deployment."""
    return {one.name: one.effect for app in plan.applications for one in app.deployments}


@pytest.fixture
def after() -> dict[str, Any]:
    return deepcopy(CONFIG)


def test_the_same_changes_nothing(after: dict[str, Any]) -> None:
    plan = planned(after)
    assert (plan.changes, plan.away) == ([], [])
    assert list(told(plan)) == ["gateway: unchanged", "m: unchanged"]


def test_a_policy_is_told_in_place(after: dict[str, Any]) -> None:
    after["applications"][0]["deployments"][0]["user_config"]["deadline_s"] = 60
    plan = planned(after)
    assert effects(plan) == {
        "Gateway": Effect.CHANGED,
        "Limits": Effect.SAME,
        "RequestLog": Effect.SAME,
    }
    assert [app.name for app in plan.changes] == ["gateway"]
    assert plan.away == []


@pytest.mark.parametrize("option", ["args", "import_path", "runtime_env"])
def test_other_code_restarts_every_deployment_of_its_application(
    after: dict[str, Any], option: str
) -> None:
    after["applications"][0][option] = {"a": 1} if option != "import_path" else "x:y"
    plan = planned(after)
    assert set(effects(plan).values()) == {Effect.RESTARTED}
    # New gateways come first; for Limits and RequestLog requests wait.
    assert plan.away == []


def test_a_surge_that_only_the_code_sets_counts(after: dict[str, Any]) -> None:
    after["applications"][1]["args"]["engine"]["max_num_seqs"] = 32
    assert planned(after).away == [
        "Model:m has one replica, which is stopped before the next is started"
    ]
    assert planned(after, {**BUILT, "m": {"Model:m": 100}}).away == []


def test_of_several_replicas_some_serve(after: dict[str, Any]) -> None:
    after["applications"][1]["deployments"][0]["ray_actor_options"] = {"num_cpus": 2}
    plan = planned(after, **{"Model:m": 2})
    assert effects(plan)["Model:m"] is Effect.RESTARTED
    assert plan.away == []


def test_fewer_replicas_restart_nothing(after: dict[str, Any]) -> None:
    after["applications"][1]["deployments"][0]["num_replicas"] = 3
    assert effects(planned(after))["Model:m"] is Effect.CHANGED


def test_a_model_by_another_name_is_away(after: dict[str, Any]) -> None:
    after["applications"][1]["args"]["name"] = "n"
    after["applications"][1]["deployments"][0]["name"] = "Model:n"
    plan = planned(after, {**BUILT, "m": {"Model:n": 0}})
    assert effects(plan) == {"Model:n": Effect.ADDED, "Model:m": Effect.REMOVED}
    assert plan.away == ["Model:m is stopped before what takes its place is there"]


def test_applications_come_and_go(after: dict[str, Any]) -> None:
    after["applications"][1]["name"] = "n"
    plan = planned(after)
    assert {app.name: app.effect for app in plan.applications} == {
        "gateway": Effect.SAME,
        "n": Effect.ADDED,
        "m": Effect.REMOVED,
    }


def test_what_serve_takes_over_at_its_start_is_named(after: dict[str, Any]) -> None:
    after["http_options"]["keep_alive_timeout_s"] = 5
    assert planned(after).not_now == ("http_options.keep_alive_timeout_s",)


def test_the_difference_is_shown_without_secrets(after: dict[str, Any]) -> None:
    after["applications"][1]["args"]["engine"]["max_num_seqs"] = 32
    after["applications"][1]["runtime_env"]["env_vars"]["TOKEN"] = "correct horse"
    lines = "\n".join(told(planned(after)))
    assert "-    max_num_seqs: 64\n" in lines
    assert "+    max_num_seqs: 32\n" in lines
    assert "Model:m: restarted, 1 replica, AWAY MEANWHILE" in lines
    assert "hunter2" not in lines
    assert "correct horse" not in lines


# The history.


def config(number: int) -> dict[str, Any]:
    """Return a config that differs by `number`."""
    return {"applications": [{"name": "a", "args": {"ü": number}}]}


def sha(number: int) -> str:
    return fingerprint(config(number)["applications"])


def keep(history: History, number: int, outcome: Outcome, restores: int | None = None) -> Entry:
    """Write down that config `number` was deployed."""
    entry = history.begin(
        config(number), by="me", source="x.yaml", sha256=sha(number), restores=restores
    )
    return history.end(entry, outcome) if outcome is not Outcome.UNFINISHED else entry


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path / "deployments")


def test_what_was_deployed_is_kept_closed_to_others(history: History, tmp_path: Path) -> None:
    keep(history, 1, Outcome.SERVED)
    keep(history, 2, Outcome.UNFINISHED)
    assert history.config(2) == config(2)
    assert [(e.number, e.outcome) for e in history.entries()] == [
        (1, Outcome.SERVED),
        (2, Outcome.UNFINISHED),
    ]
    for file in (tmp_path / "deployments").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_deployment_that_is_not_known_is_named(history: History) -> None:
    keep(history, 1, Outcome.SERVED)
    with pytest.raises(ConfigError, match=r"--to is 7; allowed: the number of a deployment \(1\)"):
        history.config(7)


def back(history: History, running: int) -> int | None:
    entry = to_go_back_to(history.entries(), sha(running))
    return None if entry is None else entry.number


def test_going_back_goes_further_back_each_time(history: History) -> None:
    for number in (1, 2, 3):
        keep(history, number, Outcome.SERVED)
    assert back(history, 3) == 2
    keep(history, 2, Outcome.SERVED, restores=2)
    assert back(history, 2) == 1
    keep(history, 1, Outcome.SERVED, restores=1)
    assert back(history, 1) is None


def test_what_did_not_serve_is_not_gone_back_to(history: History) -> None:
    keep(history, 1, Outcome.SERVED)
    keep(history, 2, Outcome.ROLLED_BACK)
    keep(history, 3, Outcome.UNFINISHED)
    assert back(history, 3) == 1


def test_after_a_start_with_an_unknown_file_the_last_that_served_is_gone_back_to(
    history: History,
) -> None:
    keep(history, 1, Outcome.SERVED)
    keep(history, 2, Outcome.SERVED)
    assert back(history, 9) == 2


def test_what_runs_is_what_is_gone_back_to(history: History) -> None:
    running = Running(status_of(CONFIG), 3002)
    assert running.to_go_back_to(history) == {
        "http_options": CONFIG["http_options"],
        "applications": CONFIG["applications"],
    }
    running.keep(history, "me")
    running.keep(history, "me")
    assert [e.source for e in history.entries()] == ["what ran"]


def test_where_what_runs_is_not_well_the_last_that_served_is_gone_back_to(
    history: History,
) -> None:
    keep(history, 1, Outcome.SERVED)
    status = status_of(CONFIG)
    status["applications"]["m"]["status"] = "DEPLOY_FAILED"
    found = Running(status, 3002).to_go_back_to(history)
    assert found is not None
    assert found["applications"] == config(1)["applications"]


def test_where_nothing_runs_there_is_nothing_to_go_back_to(history: History) -> None:
    keep(history, 1, Outcome.SERVED)
    assert Running({"applications": {}}, 3002).to_go_back_to(history) is None
