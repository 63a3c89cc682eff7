"""The reading of Serve's status: bad readings are dropped, good ones go stale."""

from __future__ import annotations

import asyncio
import time

import pytest
from ray.exceptions import RayError
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, ServeStatus

from deployments.applications import ServedApplications, StatusUnknown

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
