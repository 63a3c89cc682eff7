"""One stack for the whole suite: nginx, two gateways, the real engine and a fake one."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from openai import OpenAI

from tests.serve_configs import suite_config
from tests.stack_runner import RunningStack, running_stack


@pytest.fixture(scope="session")
def stack() -> Iterator[RunningStack]:
    with running_stack(suite_config(real_model=True, gateways=2)) as running:
        yield running


@pytest.fixture(scope="session")
def api_key(stack: RunningStack) -> str:
    return create_key(stack, "developer")


def create_key(stack: RunningStack, owner: str) -> str:
    """Return a new API key that `owner` may use."""
    created = json.loads(stack.cli("keys", "create", "test", "--owner", owner, "--json"))
    return str(created["key"])


@pytest.fixture
def client(stack: RunningStack, api_key: str) -> OpenAI:
    return OpenAI(base_url=f"{stack.url}/api/v1/comp-ai/v1", api_key=api_key, max_retries=0)
