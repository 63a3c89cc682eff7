"""A replica that dies before its answer, a client that does not read, a gateway that is lost."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import threading

import httpx
import orjson
import psutil

from tests.chaos.conftest import FLOOD, PAIR, WRITE_TIMEOUT_S
from tests.chaos.load import Load, Seen, Wishes
from tests.serve_configs import FAKE_MODEL
from tests.stack_runner import RunningStack, wait_until

_MIB = 1024 * 1024


def _retries(stack: RunningStack) -> float:
    text = httpx.get(stack.metrics_url, timeout=20).text
    counts = re.findall(r"^ray_comp_ai_retries_total\{[^}]*\} (\S+)$", text, re.MULTILINE)
    return sum(float(count) for count in counts)


async def _kill(stack: RunningStack, victim: int) -> Seen:
    load = Load(stack.url, stack.bootstrap, Wishes(model=PAIR, streams=False))
    running = asyncio.create_task(load.run())
    try:
        await load.completed(60)
        os.kill(victim, signal.SIGKILL)
        await load.completed(200)
    finally:
        load.stop()
        await running
    return load.seen


def test_no_answer_that_had_not_begun_fails_with_its_replica(stack: RunningStack) -> None:
    wait_until(stack.ready, "ready before the kill", 60)
    seen = asyncio.run(_kill(stack, stack.replicas(f"Model:{PAIR}")[0].pid))
    assert seen.failed == {}
    # Some were under way at the replica that died, or nothing was tested.
    wait_until(lambda: _retries(stack) > 0, "retries are counted", 60)
    ids = list(seen.completed)
    rows = stack.settled_rows(
        "select outcome, completion_tokens as tokens from comp_ai.requests "
        "where request_id = any($1)",
        len(ids),
        ids,
    )
    assert len(rows) == len(ids)
    assert {(row["outcome"], row["tokens"]) for row in rows} == {("completed", 20)}
    wait_until(stack.ready, "ready after the kill", 60)
    print(f"{len(ids)} completed, 0 failed, {_retries(stack):g} asked again")


def _not_reading(stack: RunningStack, request_id: str) -> socket.socket:
    """Ask for an endless stream and read nothing of it."""
    body = orjson.dumps(
        {
            "model": FLOOD,
            "messages": [{"role": "user", "content": "x"}],
            "max_tokens": 1_000_000,
            "stream": True,
        }
    )
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Authorization: {stack.bootstrap['Authorization']}\r\nX-Request-ID: {request_id}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", int(stack.env["COMP_AI_HTTP_PORT"])))
    connection.sendall(head.encode() + body)
    return connection


def _memory_bytes(stack: RunningStack) -> dict[str, int]:
    found: dict[str, list[psutil.Process]] = {
        "gateways": stack.replicas("Gateway"),
        "proxy": stack.processes("ray::ProxyActor") + stack.processes("/haproxy.cfg"),
        "nginx": stack.processes("nginx: worker"),
    }
    return {name: sum(p.memory_info().rss for p in some) for name, some in found.items()}


def test_client_that_does_not_read_is_cut_off_and_costs_little_memory(
    stack: RunningStack,
) -> None:
    wait_until(stack.ready, "ready", 60)
    clients = 3
    before = _memory_bytes(stack)
    connections = [_not_reading(stack, f"slow-{number}") for number in range(clients)]
    most = dict(before)

    def ended() -> bool:
        now = _memory_bytes(stack)
        engine = stack.engine(FLOOD)
        # While they hang. What was said until then is then put on record, which takes a few
        # times its size for a moment.
        if engine["live_leases"] == clients:
            most.update({name: max(most[name], size) for name, size in now.items()})
        return bool(engine["completion_tokens"] > 0 and engine["live_leases"] == 0)

    try:
        wait_until(ended, "the engine is stopped", 60 + WRITE_TIMEOUT_S)
        rows = stack.settled_rows(
            "select outcome, status, error_code, completion_tokens as tokens "
            "from comp_ai.requests where request_id like 'slow-%'",
            clients,
        )
    finally:
        for connection in connections:
            connection.close()
    assert {(row["outcome"], row["status"], row["error_code"]) for row in rows} == {
        ("cancelled", 499, "client_too_slow")
    }
    # It was cut off, and had not sent all that was asked for.
    assert all(0 < row["tokens"] < 1_000_000 for row in rows)
    grown = {name: (most[name] - before[name]) / _MIB / clients for name in before}
    tokens = [row["tokens"] for row in rows]
    print(f"{clients} clients; tokens until the cut {tokens}; MiB each {grown}")
    assert max(grown.values()) < 24
    assert stack.engine(FLOOD)["requests_running"] == 0


def test_lost_gateway_is_told_in_the_openai_form(stack: RunningStack) -> None:
    wait_until(stack.ready, "ready", 60)
    answers: list[httpx.Response] = []

    def ask() -> None:
        body = {
            "model": FAKE_MODEL,
            "messages": [{"role": "user", "content": "x"}],
            "max_tokens": 1000,
        }
        url = f"{stack.url}/v1/chat/completions"
        answers.append(httpx.post(url, headers=stack.bootstrap, json=body, timeout=60))

    asking = [threading.Thread(target=ask) for _ in range(6)]
    for thread in asking:
        thread.start()
    wait_until(
        lambda: stack.engine(FAKE_MODEL)["requests_running"] > 0, "an answer is under way", 30
    )
    for replica in stack.replicas("Gateway"):
        replica.kill()
    for thread in asking:
        thread.join()
    lost = [answer for answer in answers if answer.status_code != 200]
    assert lost
    for answer in lost:
        assert answer.status_code == 503
        assert answer.headers["content-type"] == "application/json"
        assert answer.json()["error"]["code"] == "unavailable"
        assert int(answer.headers["retry-after"]) >= 1
        assert len(answer.headers.get_list("x-request-id")) == 1
        assert len(answer.headers.get_list("server-timing")) == 1
    wait_until(stack.ready, "ready again", 60)


def test_long_answer_is_served_and_recorded_whole(stack: RunningStack) -> None:
    wait_until(stack.ready, "ready", 60)
    words = 20_000
    body = {"model": FLOOD, "messages": [{"role": "user", "content": "x"}], "max_tokens": words}
    for stream in (False, True):
        answer = httpx.post(
            f"{stack.url}/v1/chat/completions",
            headers=stack.bootstrap,
            json=body | {"stream": stream},
            timeout=60,
        )
        assert answer.status_code == 200, answer.text[:200]
        assert len(answer.content) > words * 300
        [row] = stack.settled_rows(
            "select r.outcome, r.completion_tokens, b.* "
            "from comp_ai.requests r join comp_ai.request_bodies b on b.id = r.id "
            "where r.request_id = $1",
            1,
            answer.headers["x-request-id"],
        )
        assert (row["outcome"], row["completion_tokens"]) == ("completed", words)
        [kept] = stack.bodies([row])
        assert kept is not None
        assert len(kept.response or "") == words * 300
