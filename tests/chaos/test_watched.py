"""The stack watched by a real Prometheus: scrapes, alerts in staged failures, dashboards.

The long form, with every alert, is `python -m load_tests.watch`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serve_configs import FAKE_MODEL, LIMITED_OWNER
from tests.stack_runner import RunningStack, wait_until
from tests.watching.dashboards import questions
from tests.watching.prometheus import Watch, missing_programs, watched
from tests.watching.stages import AWAY, SHORT, Play, Scene, wait_healthy
from tests.watching.traffic import ask_as, chat, start_batch

pytestmark = pytest.mark.skipif(
    bool(missing_programs()), reason=f"not installed, of Debian: {', '.join(missing_programs())}"
)


@pytest.fixture(scope="module")
def watch(stack: RunningStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watch]:
    wait_until(stack.ready, "ready", 90)
    # Seen by the upkeep within a minute, and asked for by the dashboards.
    stack.cli("backup", "create")
    with watched(stack, tmp_path_factory.mktemp("watch")) as running:
        wait_healthy(running)
        yield running


def test_every_scrape_is_up(watch: Watch) -> None:
    assert watch.trouble() == []
    jobs = {"comp-ai-service", "ready", "certificate", "nginx", "postgres", "host", "gpu"}
    assert watch.targets() == dict.fromkeys(jobs | {"prometheus"}, "up")


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
    start_batch(stack, chat(FAKE_MODEL))
    ask_as(stack, LIMITED_OWNER, chat(FAKE_MODEL), times=15)
    asked = [question for question in questions() if question.excuse is None]

    def unanswered() -> list[str]:
        return [f"{one.panel}: {one.query}" for one in asked if not one.answered(watch)]

    # The drift of an engine is told two minutes after its start.
    wait_until(lambda: not unanswered(), "every query has data", 180)
