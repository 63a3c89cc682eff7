"""One stack for the whole suite, with the fake engine: everything above it is real."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serve_configs import add_fake, suite_config
from tests.stack_runner import RunningStack, running_stack

PAIR = "pair"
FLOOD = "flood"
WRITE_TIMEOUT_S = 4


@pytest.fixture(scope="session")
def stack() -> Iterator[RunningStack]:
    config = suite_config(real_model=False, gateways=2)
    add_fake(config, PAIR, replicas=2)
    # Long words, to fill the buffers on the way, some ten megabytes, with fewer frames.
    add_fake(config, FLOOD, replicas=1, time_to_first_token_s=0, time_per_token_s=0, word_chars=300)
    policy = config["applications"][0]["deployments"][0]["user_config"]
    policy["client_write_timeout_s"] = WRITE_TIMEOUT_S
    with running_stack(config) as running:
        yield running
