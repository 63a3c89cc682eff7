"""Kill each part under load: no request that a client saw complete is lost or doubled."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

import httpx
import psutil
import pytest

from serve_app.stack.postgres import EmbeddedPostgres
from tests.chaos.load import Load, Seen
from tests.serve_configs import FAKE_MODEL
from tests.stack_runner import RunningStack, wait_until

_BEFORE = 60
_AFTER = 100


def _gateway(stack: RunningStack) -> int:
    return stack.replicas("Gateway")[0].pid


def _request_log(stack: RunningStack) -> int:
    return stack.replicas("RequestLog")[0].pid


def _limits(stack: RunningStack) -> int:
    return stack.replicas("Limits")[0].pid


def _postgres(stack: RunningStack) -> int:
    pid = EmbeddedPostgres(stack.home).running_pid()
    assert pid is not None
    return pid


def _nginx(stack: RunningStack) -> int:
    return next(p.pid for p in stack.processes("nginx: master"))


def _model(stack: RunningStack) -> int:
    return stack.replicas(f"Model:{FAKE_MODEL}")[0].pid


def _proxy(stack: RunningStack) -> int:
    return stack.processes("ray::ProxyActor")[0].pid


def _controller(stack: RunningStack) -> int:
    return stack.processes("ray::ServeController")[0].pid


VICTIMS: dict[str, Callable[[RunningStack], int]] = {
    "gateway": _gateway,
    "request log": _request_log,
    "PostgreSQL": _postgres,
    "limits": _limits,
    "model": _model,
    "nginx": _nginx,
    "proxy": _proxy,
    "controller": _controller,
}


async def _kill_under_load(stack: RunningStack, victim: int) -> Seen:
    load = Load(stack.url, stack.bootstrap)
    running = asyncio.create_task(load.run())
    try:
        await load.completed(_BEFORE)
        os.kill(victim, signal.SIGKILL)
        await load.completed(_AFTER)
    finally:
        load.stop()
        await running
    return load.seen


def reconcile(stack: RunningStack, seen: Seen) -> None:
    """Compare what clients saw with what the log holds; print the totals."""
    ids = list(seen.completed)
    stack.settled_rows(
        "select 1 from comp_ai.requests where request_id = any($1) and outcome = 'completed'",
        len(ids),
        ids,
    )
    rows = stack.rows(
        "select request_id, count(*) as n, min(outcome) as outcome, "
        "min(completion_tokens) as tokens from comp_ai.requests "
        "where request_id = any($1) group by request_id",
        ids,
    )
    doubled = [row["request_id"] for row in rows if row["n"] != 1]
    assert not doubled
    assert {row["request_id"] for row in rows} == seen.completed
    assert {(row["outcome"], row["tokens"]) for row in rows} == {("completed", 20)}
    again = stack.rows(
        "select request_id from comp_ai.requests where request_id = any($1) "
        "group by request_id having count(*) > 1",
        list(seen.failed),
    )
    assert not again
    print(f"{len(ids)} completed, {len(seen.failed)} failed {set(seen.failed.values())}: 0 lost")


@pytest.mark.parametrize("victim", VICTIMS)
def test_nothing_that_completed_is_lost_or_doubled(stack: RunningStack, victim: str) -> None:
    wait_until(stack.ready, "ready before the kill", 60)
    pid = VICTIMS[victim](stack)
    seen = asyncio.run(_kill_under_load(stack, pid))
    assert not psutil.pid_exists(pid)
    wait_until(stack.ready, f"ready after {victim} was killed", 60)
    reconcile(stack, seen)


def test_postgres_may_be_away(stack: RunningStack) -> None:
    """Stopped, not killed: the supervisor sees a living process that does not answer."""
    postgres = psutil.Process(_postgres(stack))
    family = [postgres, *postgres.children(recursive=True)]
    for process in family:
        process.suspend()
    try:
        seen = asyncio.run(_some_load(stack))
    finally:
        for process in family:
            process.resume()
    assert not seen.failed
    reconcile(stack, seen)


async def _some_load(stack: RunningStack) -> Seen:
    load = Load(stack.url, stack.bootstrap)
    running = asyncio.create_task(load.run())
    await load.completed(_AFTER)
    load.stop()
    await running
    return load.seen


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
    assert stack.engine(FAKE_MODEL)["live_leases"] == 0
    wait_until(stack.ready, "ready again", 60)
