"""One stack for the whole suite: nginx, two gateways, the real engine and a fake one.

The real engine has an adapter; `test_models.py` adds an embedding model for a while.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from openai import OpenAI

from serve_app.models.fetch import MINILM, SMOLLM2, fetch
from tests.adapters import write_adapter
from tests.serve_configs import REAL_MODEL, quick_to_notice, suite_config, with_adapter
from tests.stack_runner import RunningStack, free_ports, models_path, running_stack


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    adapter = tmp_path_factory.mktemp("adapter")
    write_adapter(fetch(SMOLLM2, models_path(), print), adapter)
    # `up` fetches the models of its own config only.
    fetch(MINILM, models_path(), print)
    config = with_adapter(suite_config(real_model=True, gateways=2, cold_model=True), adapter)
    # Nothing is traced but what asks for it, as `test_one_trace.py` does.
    tracing = {
        "COMP_AI_TRACING_ENDPOINT": f"http://127.0.0.1:{free_ports(1)[0]}",
        "COMP_AI_TRACING_RATIO": "0",
        "COMP_AI_TRACING_TRUST_PARENTS": "true",
    }
    with running_stack(quick_to_notice(config), **tracing) as running:
        # Started beside a busy engine, what asks for its counters misses a whole answer.
        running.engine(REAL_MODEL)
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
