"""One stack for the whole suite, with the fake engine: everything above it is real."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.serve_configs import FAKE_MODEL, add_fake, keep_journals, suite_config
from tests.sign_in_door import SignInDoor, sign_in_door
from tests.stack_runner import RunningStack, running_stack

PAIR = "pair"
GATEWAYS = 2
FLOOD = "flood"
WRITE_TIMEOUT_S = 4
# The fake model by another name, at 0.001 EUR a completion token.
PRICED = "priced"
# Where the further issuer's users and groups stand in the policy.
PARTNER = "partner"
LIMITS: dict[str, Any] = {
    "currency": "EUR",
    "principals": {
        "daily": {"cost_per_day": 0.02, "cost_per_month": 1},
        "monthly": {"cost_per_month": 0.02},
    },
    "groups": {
        f"{PARTNER}:lab": {"members": "together", "requests_per_minute": 10},
        f"{PARTNER}:trial": {"members": "each", "requests_per_minute": 4},
    },
    "roles": {
        "crew": {"members": "together", "requests_per_minute": 6},
        "intern": {"members": "each", "requests_per_minute": 3},
    },
}


@pytest.fixture(scope="session")
def door() -> Iterator[SignInDoor]:
    """A certified issuer, at which people sign in for the pages, and whose tokens are taken."""
    with sign_in_door() as running:
        yield running


@pytest.fixture(scope="session")
def journals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the engines of the fake model note what they counted."""
    return tmp_path_factory.mktemp("journals")


@pytest.fixture(scope="session")
def stack(
    door: SignInDoor, journals: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningStack]:
    config = suite_config(real_model=False, gateways=GATEWAYS)
    keep_journals(config, journals)
    add_fake(config, PAIR, replicas=2)
    # Long words, to fill the buffers on the way, some ten megabytes, with fewer frames.
    add_fake(config, FLOOD, replicas=1, time_to_first_token_s=0, time_per_token_s=0, word_chars=300)
    policy = config["applications"][0]["deployments"][0]["user_config"]
    policy["client_write_timeout_s"] = WRITE_TIMEOUT_S
    policy["models"].append(
        {
            "name": PRICED,
            "app": FAKE_MODEL,
            "engine_name": FAKE_MODEL,
            "max_tokens": 2048,
            "price_per_million_completion_tokens": 1000,
        }
    )
    policy["limits"] = {**policy["limits"], **LIMITS}
    issuers = tmp_path_factory.mktemp("issuers") / "issuers.yaml"
    _write_issuers(issuers, door)
    with running_stack(config, **door.settings, COMP_AI_OIDC_ISSUERS=str(issuers)) as running:
        yield running


def _write_issuers(file: Path, door: SignInDoor) -> None:
    file.write_text(yaml.safe_dump({"issuers": [{"name": PARTNER, "issuer": door.provider.url}]}))
