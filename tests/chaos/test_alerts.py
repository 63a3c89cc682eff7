"""A stack watched by a real Prometheus: scrapes, alerts in staged failures, dashboards.

The stack is its own, and the file the first of the suite, so that the suite's does not run yet.
Ray's page of metrics grows with each worker that ever ran on the node (ray-project/ray issue
65892); in the suite, which kills many, it comes too late to be read every 2 s.

The long form, with every alert, is `python -m load_tests.watch`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serve_configs import add_fake, suite_config
from tests.stack_runner import RunningStack, running_stack, wait_until
from tests.watching.dashboards import questions, without_data
from tests.watching.prometheus import Watch, missing_programs, stack_settings, watched
from tests.watching.stages import AWAY, PAIR, SHORT, Play, Scene, wait_healthy
from tests.watching.traffic import all_sorts

pytestmark = pytest.mark.skipif(
    bool(missing_programs()), reason=f"not installed, of Debian: {', '.join(missing_programs())}"
)


@pytest.fixture(scope="module")
def stack() -> Iterator[RunningStack]:
    config = suite_config(real_model=False, gateways=2)
    add_fake(config, PAIR, replicas=2)
    with running_stack(config, **stack_settings()) as running:
        yield running


@pytest.fixture(scope="module")
def watch(stack: RunningStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watch]:
    # Seen by the upkeep within a minute, and asked for by the dashboards.
    stack.cli("backup", "create")
    with watched(stack, tmp_path_factory.mktemp("watch")) as running:
        wait_healthy(running)
        yield running


def test_every_scrape_is_up(watch: Watch) -> None:
    wait_healthy(watch)
    jobs = {"comp-ai-service", "ready", "certificate", "nginx", "postgres", "host", "gpu"}
    assert watch.targets().keys() == jobs | {"prometheus"}


@pytest.mark.timeout(300)
def test_alerts_fire_in_staged_failures_and_stop(stack: RunningStack, watch: Watch) -> None:
    play = Play(Scene(stack, watch))
    assert not watch.firing() & {alert for stage in (*SHORT, *AWAY) for alert in stage.alerts}
    play.run(SHORT, fire_s=120, resolve_s=90)
    play.run(AWAY, fire_s=60, resolve_s=60)
    assert (play.unseen, play.unresolved) == ([], [])
    told = {("pages", "CompAIDoorDown"), ("tickets", "CompAISignInsFail")}
    wait_until(
        lambda: {(to, name, "firing") for to, name in told} <= watch.receiver.seen,
        "Alertmanager told the receivers",
        30,
    )


@pytest.mark.timeout(300)
def test_every_query_of_the_dashboards_returns_data(stack: RunningStack, watch: Watch) -> None:
    wait_until(stack.ready, "ready", 60)
    wait_healthy(watch)
    asked = [question for question in questions() if question.excuse is None]
    with all_sorts(stack):
        # The drift of an engine is told two minutes after its start.
        assert without_data(asked, watch, 180) == []
