"""One stack for the whole suite, with the fake engine: everything above it is real."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serve_configs import suite_config
from tests.stack_runner import RunningStack, running_stack


@pytest.fixture(scope="session")
def stack() -> Iterator[RunningStack]:
    with running_stack(suite_config(real_model=False, gateways=2)) as running:
        yield running
