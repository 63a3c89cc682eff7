"""What every suite has: a test that fails shows what its stack said last."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from tests.stack_runner import RunningStack

_TROUBLE = ('"level": "WARNING"', '"level": "ERROR"')
_MOST_LINES = 20


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the last warnings and errors of the stack, whose files go with the run."""
    report = yield
    if report.failed:
        for name, value in getattr(item, "funcargs", {}).items():
            if isinstance(value, RunningStack):
                report.sections.append((f"what {name} said last", troubles(value)))
    return report


def troubles(stack: RunningStack) -> str:
    """Return the last warnings and errors of our processes, one a line."""
    lines = [line for line in stack.said().splitlines() if any(one in line for one in _TROUBLE)]
    return "\n".join(lines[-_MOST_LINES:])
