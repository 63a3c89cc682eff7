"""Clients that come and go leave nothing behind. The long form is `python -m load_tests.soak`."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

from load_tests.bench.asking import Door
from load_tests.soak.churn import Churn, Seen
from load_tests.soak.trend import Figures
from load_tests.soak.watching import LASTING, lasting, more_held, rest
from tests.chaos.conftest import GATEWAYS
from tests.serve_configs import FAKE_MODEL
from tests.stack_runner import RunningStack, wait_until

_CLIENTS = 16
# Until caches and pools are filled.
_WARM_UP = 400
_HALF = 1500
# Most that a part may grow by in either half, all its processes together. Of 1,500 requests 95 %
# have a key that is good, and so pass every part: where one kept 7 KB of each, that is 10 MiB. What
# a gateway has freed since it last gave it back, seconds ago, counts here as well.
_MOST_BYTES = 10 * 2**20
_REST_S = 60.0


async def _churned(stack: RunningStack) -> tuple[list[Figures], Seen]:
    """Return what the stack holds at rest: before, between and after two halves of churn."""
    churn = Churn(Door(url=stack.url, headers=stack.bootstrap), FAKE_MODEL, tokens=(1, 8))
    await churn.by_clients(_CLIENTS, _WARM_UP)
    held = [await rest(stack, {}, longest_s=_REST_S)]
    seen = churn.forget()
    for _ in range(2):
        await churn.by_clients(_CLIENTS, _HALF)
        held.append(await rest(stack, held[0], longest_s=_REST_S))
    return held, seen


def _growth_bytes(held: list[Figures]) -> dict[str, float]:
    """Return by how much each part grew in the half in which it grew more."""
    return {
        part: max(
            later[part]["memory_bytes"] - sooner[part]["memory_bytes"]
            for sooner, later in pairwise(held)
        )
        for part in LASTING
        if part in held[0]
    }


def _all_there(stack: RunningStack) -> bool:
    found = lasting(stack)
    replicas = {"Gateway": GATEWAYS, "Limits": 1, "RequestLog": 1, FAKE_MODEL: 1}
    return found.keys() == set(LASTING) and all(
        len(found[part]) == count for part, count in replicas.items()
    )


@pytest.mark.timeout(400)
def test_churn_leaves_nothing_behind(stack: RunningStack) -> None:
    wait_until(stack.ready, "ready before the churn", 60)
    # A test before may have had them replaced.
    wait_until(lambda: _all_there(stack), "each part is there, and no older one", 60)
    born = lasting(stack)
    held, seen = asyncio.run(_churned(stack))
    grown = _growth_bytes(held)
    print({part: f"{size / 2**20:+.1f} MiB" for part, size in grown.items()}, dict(seen.asked))
    assert seen.failed == {}
    assert sum(seen.asked.values()) == 2 * _HALF
    # A process that was replaced would hide what it held.
    assert lasting(stack) == born
    assert more_held(held[0], held[-1]) == []
    # Gateways keep some for a second.
    wait_until(lambda: stack.engine(FAKE_MODEL)["live_leases"] == 0, "no lease is left", 10)
    assert max(grown.values()) < _MOST_BYTES
