"""Two RequestLog replicas: one may die or refuse, and every row still comes, once."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from serve_app.accounts.spool import Spool
from serve_app.accounts.spool_files import read_reports
from tests.chaos.load import Load, Wishes
from tests.chaos.reconcile import forget_counts, reconcile
from tests.chaos.storm import Storm, rage
from tests.stack_runner import RunningStack, wait_until

_REPLICAS = 2
# As of a disk that fails: each append is refused, and at once.
_REFUSE = """
create trigger refuse before insert on spool begin select raise(abort, 'refused'); end
"""
# What a log says of it.
_REFUSED = "spool.write_failed"
_ASKED_WITHIN_S = 120.0
_WISHES = Wishes(tokens=(1, 5))


def _with_logs(config: dict[str, Any], replicas: int) -> dict[str, Any]:
    config = deepcopy(config)
    for deployment in config["applications"][0]["deployments"]:
        if deployment["name"] == "RequestLog":
            deployment["num_replicas"] = replicas
    return config


def _deploy(stack: RunningStack, replicas: int) -> None:
    stack.deploy(_with_logs(stack.config(), replicas))
    wait_until(
        lambda: len(_held(stack)) == replicas == len(stack.replicas("RequestLog")),
        f"{replicas} request logs, each with its spool",
        90,
    )
    wait_until(stack.ready, "ready", 60)


@pytest.fixture(scope="module")
def two_logs(stack: RunningStack) -> Iterator[RunningStack]:
    _deploy(stack, _REPLICAS)
    yield stack
    # What is left in the spool of the one that goes is moved by the other.
    _deploy(stack, 1)


def _held(stack: RunningStack) -> list[Path]:
    """Return the spools of the replicas that run."""
    return [one.folder / Spool.FILE for one in read_reports(stack.home / "spool") if one.held]


def _taken(spool: Path) -> int:
    """Return how many records a spool ever took."""
    with closing(sqlite3.connect(f"file:{spool}?mode=ro", uri=True)) as connection:
        found = connection.execute("select seq from sqlite_sequence where name = 'spool'")
        return int((found.fetchone() or (0,))[0])


def test_what_one_log_refuses_another_takes(two_logs: RunningStack, journals: Path) -> None:
    forget_counts(journals)
    storm = asyncio.run(_load_beside_a_refusing_spool(two_logs))
    account = reconcile(two_logs, storm, journals)
    print(str(account))
    assert (account.wrong, account.unrecorded, account.failed.total()) == ([], 0, 0)


async def _load_beside_a_refusing_spool(stack: RunningStack) -> Storm:
    load = Load(stack.url, stack.bootstrap, _WISHES)
    running = asyncio.create_task(load.run())
    await load.completed(50)
    before = _refusals(stack)
    with closing(sqlite3.connect(_held(stack)[0], isolation_level=None)) as connection:
        connection.execute(_REFUSE)
        try:
            await load.completed(100)
            # The gateways' direct lines may all have led to the other one until now.
            async with asyncio.timeout(_ASKED_WITHIN_S):
                while _refusals(stack) == before:
                    await load.completed(20)
        finally:
            connection.execute("drop trigger refuse")
    await load.completed(50)
    load.stop()
    await running
    assert _refusals(stack) > before
    return Storm(seen=load.seen)


async def _load_until_each_took(stack: RunningStack, spools: list[Path], before: list[int]) -> None:
    """Ask on: the gateways' direct lines may all have led to one of the logs until now."""
    load = Load(stack.url, stack.bootstrap, _WISHES)
    running = asyncio.create_task(load.run())
    try:
        async with asyncio.timeout(_ASKED_WITHIN_S):
            while any(_taken(s) <= then for s, then in zip(spools, before, strict=True)):
                await load.completed(20)
    finally:
        load.stop()
        await running


def _refusals(stack: RunningStack) -> int:
    return (stack.home / "up.log").read_text(errors="replace").count(_REFUSED)


def test_a_killed_log_loses_nothing_and_no_client_sees_it(
    two_logs: RunningStack, journals: Path
) -> None:
    forget_counts(journals)
    spools = _held(two_logs)
    before = [_taken(spool) for spool in spools]
    storm = asyncio.run(
        rage(two_logs, ["request log"], random.Random(1), _WISHES, between=150, at_the_end=300)
    )
    account = reconcile(two_logs, storm, journals)
    print(f"{storm.kills.total()} kill: {account}")
    assert (account.wrong, account.unrecorded, account.failed.total()) == ([], 0, 0)
    asyncio.run(_load_until_each_took(two_logs, spools, before))
    after = [_taken(spool) for spool in spools]
    assert all(now > then for now, then in zip(after, before, strict=True)), (before, after)
