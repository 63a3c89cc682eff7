"""Kill each part under load: no request that a client saw complete is lost or doubled."""

from __future__ import annotations

import asyncio
import random
import secrets
from pathlib import Path

import httpx
import psutil
import pytest

from tests.chaos.load import Load, Wishes
from tests.chaos.reconcile import forget_counts, reconcile
from tests.chaos.storm import Storm, rage
from tests.chaos.victims import VICTIMS
from tests.serve_configs import FAKE_MODEL
from tests.stack_runner import RunningStack, wait_until

_BETWEEN = 80
_WISHES = Wishes(tokens=(1, 20), leaving=0.1)


@pytest.mark.timeout(600)
def test_nothing_that_completed_is_lost_or_doubled(stack: RunningStack, journals: Path) -> None:
    """Each part is killed, some twice. The long form is `python -m load_tests.chaos`."""
    wait_until(stack.ready, "ready before the kills", 60)
    seed = secrets.randbelow(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    victims = [*VICTIMS, *rng.choices([*VICTIMS], k=4)]
    rng.shuffle(victims)
    forget_counts(journals)
    storm = asyncio.run(
        rage(stack, victims, rng, _WISHES, between=_BETWEEN, at_the_end=2 * _BETWEEN)
    )
    wait_until(stack.ready, "ready after the kills", 90)
    account = reconcile(stack, storm, journals)
    print(f"{storm.kills.total()} kills: {account}")
    assert account.wrong == []


def test_postgres_may_be_away(stack: RunningStack, journals: Path) -> None:
    """Stopped, not killed: the supervisor sees a living process that does not answer."""
    wait_until(stack.ready, "ready", 60)
    forget_counts(journals)
    pid = stack.postgres.running_pid()
    assert pid is not None
    postgres = psutil.Process(pid)
    family = [postgres, *postgres.children(recursive=True)]
    for process in family:
        process.suspend()
    try:
        storm = asyncio.run(_some_load(stack))
    finally:
        for process in family:
            process.resume()
    assert not storm.seen.failed
    account = reconcile(stack, storm, journals)
    assert (account.wrong, account.unrecorded) == ([], 0)


async def _some_load(stack: RunningStack) -> Storm:
    load = Load(stack.url, stack.bootstrap)
    running = asyncio.create_task(load.run())
    await load.completed(100)
    load.stop()
    await running
    return Storm(seen=load.seen)


def test_key_of_a_killed_gateway_is_free_again(stack: RunningStack) -> None:
    body = {
        "model": FAKE_MODEL,
        "messages": [{"role": "user", "content": "long"}],
        "max_tokens": 1000,
        "stream": True,
    }
    url, headers = f"{stack.url}/v1/chat/completions", stack.bootstrap | {"Idempotency-Key": "k"}
    with httpx.stream("POST", url, headers=headers, json=body, timeout=60) as response:
        assert response.status_code == 200, response.read()
        # Held on to: the connection closes with the iterator, and that frees the key at once.
        parts = response.iter_raw()
        next(parts)
        for replica in stack.replicas("Gateway"):
            replica.kill()
    [row] = stack.rows("select state from comp_ai.idempotency_keys where key = 'k'")
    assert row["state"] == "claimed"
    wait_until(stack.ready, "ready again", 60)
    seen: list[httpx.Response] = []

    def answered() -> bool:
        seen.append(httpx.post(url, headers=headers, json=body, timeout=60))
        return seen[-1].status_code == 200

    wait_until(answered, "the claim has ended", 60)
    # None, where the gateways took longer to come back than the claim to end.
    assert {answer.json()["error"]["code"] for answer in seen[:-1]} <= {"idempotency_key_in_use"}
    assert seen[-1].text.endswith("data: [DONE]\n\n")
    assert "idempotent-replayed" not in seen[-1].headers
    again = httpx.post(url, headers=headers, json=body, timeout=60)
    assert (again.content, again.headers["idempotent-replayed"]) == (seen[-1].content, "true")


def test_leases_and_reservations_do_not_outlive_a_killed_gateway(stack: RunningStack) -> None:
    with httpx.stream(
        "POST",
        f"{stack.url}/v1/chat/completions",
        headers=stack.bootstrap,
        json={
            "model": FAKE_MODEL,
            "messages": [{"role": "user", "content": "long"}],
            "max_tokens": 2000,
            "stream": True,
        },
        timeout=60,
    ) as response:
        # Held on to: the connection closes with the iterator, and the client would be gone.
        parts = response.iter_raw()
        next(parts)
        for replica in stack.replicas("Gateway"):
            replica.kill()
    wait_until(lambda: stack.engine(FAKE_MODEL)["requests_running"] == 0, "the engine is idle", 30)
    wait_until(lambda: stack.engine(FAKE_MODEL)["live_leases"] == 0, "no lease is left", 10)
    wait_until(stack.ready, "ready again", 60)
