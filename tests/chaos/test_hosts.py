"""Several hosts under load: one is added, one is lost, and the head is killed and comes back.

    TEST_HOSTS=1 pytest -s tests/chaos/test_hosts.py      as root, on a machine without other work

Ray gives a node up that is not there after 15 s, which cannot be set: two busy cores may be too
slow for that. On two cores with some other work it passed in 6 minutes.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import httpx
import pytest

from tests.chaos.host_cluster import PORTS, TIME_PER_TOKEN_S, HostCluster, running_cluster
from tests.chaos.hosts import why_not
from tests.chaos.load import Load, Seen, Wishes
from tests.chaos.reconcile import forget_counts, reconcile
from tests.chaos.storm import Storm
from tests.serve_configs import FAKE_MODEL

# All but the last are the table of docs/deployment.md.
_STATED_PORTS = {3002, 3004, 6379, 8265, 8090, *PORTS, *range(32768, 61000)}
_MODEL = f"Model:{FAKE_MODEL}"
# Three hosts share the cores of one machine: a load that fills them keeps Ray from starting.
_WISHES = Wishes(clients=12, tokens=(10, 40), pause_s=0.3)
_BACK_S = 240
# Longer than it takes to notice a dead head, and to go on.
_LONG_TOKENS = round(25 / TIME_PER_TOKEN_S)
_STREAMS = 2


@pytest.fixture(scope="module")
def cluster() -> Iterator[HostCluster]:
    if not os.environ.get("TEST_HOSTS"):
        pytest.skip("several hosts want a machine without other work: set TEST_HOSTS=1")
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with running_cluster("a") as running:
        yield running


@pytest.mark.timeout(400)
def test_a_host_is_added_under_load(cluster: HostCluster) -> None:
    """No request fails, and the new host has its part of them."""
    forget_counts(cluster.journals)
    seen = asyncio.run(_under_load(cluster, lambda: _add(cluster, "b")))
    [new] = [one for one, host in cluster.replicas(_MODEL).items() if host == "b"]
    account = reconcile(cluster, Storm(seen=seen), cluster.journals)
    print(account)
    assert (seen.failed, account.wrong) == ({}, [])
    served = cluster.rows("select replica_id from comp_ai.requests where replica_id = $1", new)
    assert served
    assert '"action":"request"' in cluster.hosts["b"].said()


def test_hosts_listen_on_the_ports_of_the_firewall_table_alone(cluster: HostCluster) -> None:
    for host in cluster.hosts.values():
        assert host.listens() <= _STATED_PORTS, f"{host.name}: {host.listens() - _STATED_PORTS}"


@pytest.mark.timeout(400)
def test_a_host_is_lost_under_load(cluster: HostCluster) -> None:
    """What was under way there fails, and nothing else; its records come when it is back."""
    _make_whole(cluster)
    forget_counts(cluster.journals)
    lost_s = 0.0

    def lose() -> None:
        nonlocal lost_s
        lost_s = time.monotonic()
        cluster.hosts["b"].switch_off()

    seen = asyncio.run(_under_load(cluster, lose))
    told = f"{len(seen.failed)} failed: {dict(seen.troubles)}"
    print(f"host lost: {told}, the last asked after {seen.last_failure_s(lost_s):.1f} s")
    print(f"longest pause {seen.longest_pause_s(lost_s):.1f} s")
    # A client has one request under way: it fails once at the most.
    assert len(seen.failed) <= _WISHES.clients
    _make_whole(cluster)
    assert _wrong(cluster, seen, [], lost_s) == []


@pytest.mark.timeout(600)
def test_the_head_is_killed_and_comes_back(cluster: HostCluster) -> None:
    """Streams on the other hosts go on, and so do requests, with it and without it."""
    _make_whole(cluster)
    forget_counts(cluster.journals)
    before = cluster.replicas(_MODEL)
    long: dict[str, bool] = {}
    moments: dict[str, float] = {}

    async def trouble() -> None:
        async with _long_streams(cluster, ["a", "b"]) as streams:
            moments["killed"] = time.monotonic()
            await asyncio.to_thread(cluster.hosts["head"].switch_off)
            moments["off"] = time.monotonic()
            await load.completed(100)
            moments["without"] = time.monotonic()
            await asyncio.to_thread(cluster.start_head)
            long.update(await streams)
        await asyncio.to_thread(cluster.wait_on_each, "head", "a", "b", timeout_s=_BACK_S)
        moments["back"] = time.monotonic()

    load = Load(cluster.url, cluster.bootstrap, _WISHES)
    asyncio.run(_with(load, trouble))
    seen, killed_s = load.seen, moments["killed"]
    for name, at_s in moments.items():
        print(f"{name} after {at_s - killed_s:.1f} s")
    print(f"{len(seen.failed)} failed: {dict(seen.troubles)}")
    print(f"the last asked after {seen.last_failure_s(killed_s):.1f} s")
    print(f"longest pause {seen.longest_pause_s(killed_s):.1f} s")
    on_head = {one for one, host in before.items() if host == "head"}
    query = "select request_id, replica_id from comp_ai.requests where request_id = any($1)"
    rows = cluster.rows(query, list(long))
    replica_of = {row["request_id"]: row["replica_id"] for row in rows}
    survived = {one for one, whole in long.items() if whole}
    print(f"{len(survived)} of {len(long)} long streams went on")
    assert {one for one in long if replica_of.get(one) not in on_head} <= survived
    assert len(seen.failed) <= _WISHES.clients
    # Those of the other hosts are the same as before: the head took them over.
    after = cluster.replicas(_MODEL)
    assert before.keys() - on_head <= after.keys()
    assert _wrong(cluster, seen, list(long), killed_s) == []


@pytest.mark.timeout(400)
def test_a_host_is_taken_away_under_load(cluster: HostCluster) -> None:
    """Told to stop, it lets what it has under way finish: no request fails."""
    _make_whole(cluster)
    forget_counts(cluster.journals)

    def take_away() -> None:
        cluster.open_door("head", "a")
        begun_s = time.monotonic()
        cluster.hosts["b"].stop()
        print(f"host taken away in {time.monotonic() - begun_s:.0f} s")

    seen = asyncio.run(_under_load(cluster, take_away))
    assert seen.failed == {}
    _make_whole(cluster)
    account = reconcile(cluster, Storm(seen=seen), cluster.journals)
    assert account.wrong == []


def _wrong(cluster: HostCluster, seen: Seen, besides: list[str], killed_s: float) -> list[str]:
    """Compare what clients saw with the rows, with the requests `besides` among them.

    A gateway died with its host at `killed_s`, by the monotonic clock.
    """
    seen.left.update(besides)
    storm = Storm(kills=Counter(gateway=1), gateway_kills_s=[killed_s], seen=seen)
    account = reconcile(cluster, storm, cluster.journals)
    print(account)
    return account.wrong


def _add(cluster: HostCluster, name: str) -> None:
    cluster.start_worker(name)
    names = [*(one for one, host in cluster.hosts.items() if host.runs)]
    cluster.deploy(len(names))
    cluster.wait_on_each(*names)
    cluster.open_door(*names)


def _make_whole(cluster: HostCluster) -> None:
    """Have the head and two workers run."""
    if "b" not in cluster.hosts:
        _add(cluster, "b")
    if not cluster.hosts["b"].runs:
        cluster.start_worker("b")
    cluster.wait_on_each("head", "a", "b")
    cluster.open_door("head", "a", "b")


async def _under_load(cluster: HostCluster, act: Callable[[], None]) -> Seen:
    load = Load(cluster.url, cluster.bootstrap, _WISHES)

    async def trouble() -> None:
        await asyncio.to_thread(act)

    await _with(load, trouble)
    return load.seen


async def _with(load: Load, trouble: Callable[[], Awaitable[None]]) -> None:
    running = asyncio.create_task(load.run())
    try:
        await load.completed(60)
        await trouble()
        await load.completed(200)
    finally:
        load.stop()
        await running


@asynccontextmanager
async def _long_streams(
    cluster: HostCluster, names: list[str]
) -> AsyncIterator[asyncio.Task[dict[str, bool]]]:
    """Open streams at the gateways of these hosts; yield, once all run, what becomes of each."""
    begun = asyncio.Semaphore(0)
    urls = [cluster.gateway_of(name) for name in names for _ in range(_STREAMS)]
    ids = [uuid.uuid4().hex for _ in urls]
    async with httpx.AsyncClient(headers=cluster.bootstrap, timeout=120, trust_env=False) as http:
        asking = [_stream(http, url, one, begun) for url, one in zip(urls, ids, strict=True)]
        streams = asyncio.gather(*asking)
        async with asyncio.timeout(60):
            for _ in ids:
                await begun.acquire()
        yield asyncio.create_task(_named(ids, streams))


async def _named(ids: list[str], streams: asyncio.Future[list[bool]]) -> dict[str, bool]:
    return dict(zip(ids, await streams, strict=True))


async def _stream(
    http: httpx.AsyncClient, url: str, request_id: str, begun: asyncio.Semaphore
) -> bool:
    """Return whether the stream came to its end, whole."""
    body = {
        "model": FAKE_MODEL,
        "messages": [{"role": "user", "content": "long"}],
        "max_tokens": _LONG_TOKENS,
        "stream": True,
    }
    headers, path = {"X-Request-ID": request_id}, f"{url}/v1/chat/completions"
    end = b""
    try:
        async with http.stream("POST", path, json=body, headers=headers) as answer:
            assert answer.status_code == 200, await answer.aread()
            async for part in answer.aiter_raw():
                if not end:
                    begun.release()
                end = (end + part)[-64:]
    except httpx.HTTPError:
        return False
    return end.endswith(b"data: [DONE]\n\n")
