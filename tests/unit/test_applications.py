"""The reading of Serve's status: bad readings are dropped, good ones go stale."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
from ray.exceptions import RayError
from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatus,
    DeploymentStatusOverview,
    DeploymentStatusTrigger,
    ReplicaState,
    ServeStatus,
)

from deployments.applications import ServedApplications, StatusUnknown, state_of
from serve_app.contracts import ModelState

_APPLICATION = ApplicationStatusOverview(
    status=ApplicationStatus.RUNNING, message="", last_deployed_time_s=0.0, deployments={}
)
GOOD = ServeStatus(applications={"gateway": _APPLICATION})
EMPTY = ServeStatus()


class Serve:
    """Answers as told, in order; the last answer stays."""

    def __init__(self, *answers: ServeStatus | Exception) -> None:
        self.answers = list(answers)
        self.asked = 0

    def status(self) -> ServeStatus:
        """Return or raise the next answer."""
        self.asked += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


class Clock:
    """Monotonic seconds that a test sets."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now_s


@pytest.mark.parametrize("bad", [EMPTY, RayError("gone"), ValueError("not by its schema")])
async def test_a_bad_reading_is_not_believed(bad: ServeStatus | Exception) -> None:
    clock, served = Clock(), Serve(GOOD, bad)
    applications = ServedApplications(served.status, clock)
    assert "gateway" in await applications.get()
    clock.now_s += 5
    assert "gateway" in await applications.get()
    assert served.asked == 2


async def test_a_status_that_stays_unreadable_is_unknown() -> None:
    clock, served = Clock(), Serve(GOOD, EMPTY)
    applications = ServedApplications(served.status, clock)
    await applications.get()
    clock.now_s += 16
    with pytest.raises(StatusUnknown):
        await applications.get()
    served.answers = [GOOD]
    assert "gateway" in await applications.get()


async def test_those_who_ask_at_once_share_a_reading() -> None:
    served = Serve(GOOD)

    def slow() -> ServeStatus:
        time.sleep(0.02)  # a thread that waits for the controller
        return served.status()

    applications = ServedApplications(slow)
    await asyncio.gather(*(applications.get() for _ in range(5)))
    assert served.asked == 1


async def test_nobody_waits_for_an_answer_that_does_not_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the head of the cluster is away, the question stays open until it is back."""
    monkeypatch.setattr("deployments.applications._ANSWER_S", 0.01)
    served, back = Serve(GOOD), threading.Event()

    def away() -> ServeStatus:
        back.wait(30)
        return served.status()

    applications = ServedApplications(away)
    for _ in range(3):
        with pytest.raises(StatusUnknown):
            await applications.get()
    monkeypatch.setattr("deployments.applications._ANSWER_S", 30)
    back.set()
    assert "gateway" in await applications.get()
    # Not one question, and one thread, for each who wanted to know.
    assert served.asked == 1


def _app(status: ApplicationStatus, *deployments: DeploymentStatusOverview) -> Any:
    named = {str(number): deployment for number, deployment in enumerate(deployments)}
    return ApplicationStatusOverview(
        status=status, message="", last_deployed_time_s=0.0, deployments=named
    )


def _deployment(status: DeploymentStatus, **replicas: int) -> DeploymentStatusOverview:
    return DeploymentStatusOverview(
        status=status,
        status_trigger=DeploymentStatusTrigger.UNSPECIFIED,
        replica_states={ReplicaState(state): count for state, count in replicas.items()},
        message="",
    )


_RUNS = _deployment(DeploymentStatus.HEALTHY, RUNNING=1)
_SLEEPS = _deployment(DeploymentStatus.HEALTHY)
_WAKES = _deployment(DeploymentStatus.UPSCALING, STARTING=1)
_ILL = _deployment(DeploymentStatus.UNHEALTHY, STARTING=1)


@pytest.mark.parametrize("status", [ApplicationStatus.DEPLOYING, ApplicationStatus.DEPLOY_FAILED])
async def test_what_is_built_anew_goes_on_meanwhile(status: ApplicationStatus) -> None:
    clock = Clock()
    running = ServeStatus(applications={"m": _app(ApplicationStatus.RUNNING, _RUNS)})
    served = Serve(running, ServeStatus(applications={"m": _app(status)}))
    applications = ServedApplications(served.status, clock)
    for _ in range(3):
        assert state_of((await applications.get())["m"]) is ModelState.SERVING
        clock.now_s += 5
    served.answers = [ServeStatus(applications={"m": _app(ApplicationStatus.DELETING)})]
    assert state_of((await applications.get())["m"]) is ModelState.ABSENT


@pytest.mark.parametrize(
    ("app", "state"),
    [
        (None, ModelState.ABSENT),
        (_app(ApplicationStatus.DELETING, _RUNS), ModelState.ABSENT),
        (_app(ApplicationStatus.DEPLOY_FAILED), ModelState.FAILED),
        (_app(ApplicationStatus.DEPLOYING), ModelState.STARTING),
        # The replicas of before go on.
        (
            _app(
                ApplicationStatus.DEPLOY_FAILED,
                _deployment(DeploymentStatus.DEPLOY_FAILED, RUNNING=1),
            ),
            ModelState.SERVING,
        ),
        (
            _app(ApplicationStatus.DEPLOY_FAILED, _deployment(DeploymentStatus.DEPLOY_FAILED)),
            ModelState.FAILED,
        ),
        (_app(ApplicationStatus.RUNNING, _RUNS), ModelState.SERVING),
        (_app(ApplicationStatus.RUNNING, _SLEEPS), ModelState.ASLEEP),
        (_app(ApplicationStatus.RUNNING, _WAKES), ModelState.STARTING),
        (_app(ApplicationStatus.UNHEALTHY, _ILL), ModelState.FAILED),
        # One replica is lost, another goes on.
        (
            _app(
                ApplicationStatus.UNHEALTHY,
                _deployment(DeploymentStatus.UNHEALTHY, RUNNING=1, STARTING=1),
            ),
            ModelState.SERVING,
        ),
        # It serves only where each of its deployments does.
        (_app(ApplicationStatus.RUNNING, _RUNS, _WAKES), ModelState.STARTING),
    ],
)
def test_how_a_model_is(app: ApplicationStatusOverview | None, state: ModelState) -> None:
    assert state_of(app) is state
