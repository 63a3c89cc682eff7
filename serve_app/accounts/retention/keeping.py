"""Retention: months that are past their time go, whole partitions at once.

Rows of a subject under a legal hold stay in the partition of their month, which is emptied of the
others: whoever reads, exports or erases finds them there as before. Once the hold is released the
partition goes. No writer waits longer than for a lock that is taken within `lock_timeout_s` and
held for moments; a partition that is in use (a backup reads it) is left for the next time.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass

import asyncpg

from serve_app.accounts.retention.policy import DataClass, Keep, RetentionPolicy
from serve_app.accounts.retention.tables import TABLES, Table
from serve_app.audit.act import SERVICE_ITSELF, Actor, AuditAct
from serve_app.audit.log import AuditLog

logger = logging.getLogger(__name__)

DROP = "retention.drop"
# Shorter than PostgreSQL's deadlock_timeout, so that in a deadlock it is we who give up.
LOCK_TIMEOUT_S = 0.5
_SWEEP_ROWS = 5000
SERVICE = Actor(id="retention", kind=SERVICE_ITSELF)


@dataclass(frozen=True, slots=True, kw_only=True)
class Expired:
    """What is past its time: a partition, or rows in the default one (`whole` is False).

    `rows` are those that go, `held_rows` those that a legal hold keeps.
    """

    data: DataClass
    partition: str
    rows: int
    held_rows: int = 0
    size_bytes: int = 0
    whole: bool = True

    @property
    def went(self) -> bool:
        """Whether the partition itself goes."""
        return self.whole and not self.held_rows


async def expired(connection: asyncpg.Connection, policy: RetentionPolicy) -> list[Expired]:
    """Return what `apply` would remove now; counts rows, so it reads all of them."""
    return [
        found
        for data in DataClass
        if (keep := policy.of(data)) is not None
        for found in await _expired(connection, data, keep)
    ]


async def apply(
    connection: asyncpg.Connection, policy: RetentionPolicy, by: Actor = SERVICE
) -> AsyncIterator[Expired]:
    """Remove what is past its time and yield each removal, which is in the audit log then.

    Raises:
        asyncpg.PostgresError: PostgreSQL refuses; what was yielded stays removed.
    """
    for data in DataClass:
        keep = policy.of(data)
        if keep is None:
            continue
        for partition in await _partitions(connection, data, keep):
            done = await _try_removal(connection, data, partition, by)
            if done is not None:
                yield done
        swept = await _sweep(connection, data, keep, by)
        if swept is not None:
            yield swept


async def _expired(connection: asyncpg.Connection, data: DataClass, keep: Keep) -> list[Expired]:
    table = TABLES[data]
    found = []
    for row in await _partitions(connection, data, keep):
        counted = await _count(connection, data, row)
        if counted.rows or not counted.held_rows:
            found.append(counted)
    stray = await _default(connection, table)
    if stray is not None:
        rows = await connection.fetchval(table.sql("count_stray", partition=stray), *_ago(keep))
        if rows:
            found.append(Expired(data=data, partition=stray, rows=rows, whole=False))
    return found


async def _partitions(
    connection: asyncpg.Connection, data: DataClass, keep: Keep
) -> list[asyncpg.Record]:
    table = TABLES[data]
    return list(await connection.fetch(table.sql("partitions"), table.name, *_ago(keep)))


async def _count(
    connection: asyncpg.Connection, data: DataClass, partition: asyncpg.Record
) -> Expired:
    name = partition["name"]
    counts = await connection.fetchrow(TABLES[data].sql("count", partition=name))
    assert counts is not None
    return Expired(
        data=data,
        partition=name,
        rows=counts["all_rows"] - counts["held_rows"],
        held_rows=counts["held_rows"],
        size_bytes=partition["size_bytes"],
    )


async def _try_removal(
    connection: asyncpg.Connection, data: DataClass, partition: asyncpg.Record, by: Actor
) -> Expired | None:
    """Remove a partition, or what is not held of it; None where there is nothing, or it is busy."""
    try:
        async with connection.transaction():
            return await _remove(connection, data, partition, by)
    except asyncpg.LockNotAvailableError:
        logger.info(
            "%s is in use, so it stays until the next time",
            partition["name"],
            extra={"action": "retention.busy"},
        )
        return None


async def _remove(
    connection: asyncpg.Connection, data: DataClass, partition: asyncpg.Record, by: Actor
) -> Expired | None:
    table, name = TABLES[data], partition["name"]
    timeout_ms = str(round(LOCK_TIMEOUT_S * 1000))
    await connection.execute("select set_config('lock_timeout', $1, true)", timeout_ms)
    turn = await connection.fetchrow(table.sql("take_turn"), name)
    assert turn is not None
    if turn["to_regclass"] is None:  # another runner was here
        return None
    await connection.execute(table.sql("keep_out_holds"))
    done = await _count(connection, data, partition)
    if done.held_rows and not done.rows:
        return None
    if done.held_rows:
        await _empty(connection, table, name)
    else:
        await _drop(connection, table, name)
    await _note(connection, done, by)
    return done


async def _drop(connection: asyncpg.Connection, table: Table, name: str) -> None:
    # The last step but the audit row: from here on the writers of the whole table wait.
    await connection.execute(table.sql("lock_to_drop", partition=name))
    if await connection.fetchval(table.sql("some_are_held", partition=name)):
        # One came late, since they were counted. It is seen the next time.
        raise asyncpg.LockNotAvailableError(f"{name} changed")
    await connection.execute(table.sql("drop_partition", partition=name))


async def _empty(connection: asyncpg.Connection, table: Table, name: str) -> None:
    # Of this month alone: no one writes there any more but the drain with a late record.
    await connection.execute(table.sql("lock_to_empty", partition=name))
    await connection.execute(table.sql("set_held_aside", partition=name))
    await connection.execute(table.sql("empty_partition", partition=name))
    await connection.execute(table.sql("put_held_back", partition=name))


async def _sweep(
    connection: asyncpg.Connection, data: DataClass, keep: Keep, by: Actor
) -> Expired | None:
    """Remove what is past its time of the default partition, in steps."""
    table = TABLES[data]
    name = await _default(connection, table)
    if name is None:
        return None
    removed = 0
    while rows := await _sweep_some(connection, table, name, keep):
        removed += rows
    if not removed:
        return None
    done = Expired(data=data, partition=name, rows=removed, whole=False)
    async with connection.transaction():
        await _note(connection, done, by)
    return done


async def _sweep_some(connection: asyncpg.Connection, table: Table, name: str, keep: Keep) -> int:
    async with connection.transaction():
        await connection.execute(table.sql("keep_out_holds"))
        sweep = table.sql("sweep_stray", partition=name)
        done = await connection.execute(sweep, *_ago(keep), _SWEEP_ROWS)
    return int(done.rsplit(" ", 1)[1])  # "DELETE <rows>"


async def _default(connection: asyncpg.Connection, table: Table) -> str | None:
    name: str | None = await connection.fetchval(table.sql("default_partition"), table.name)
    return name


async def _note(connection: asyncpg.Connection, done: Expired, by: Actor) -> None:
    after = {"data": done.data.value, "rows": done.rows, "held_rows": done.held_rows}
    act = AuditAct(actor=by, action=DROP, target=done.partition, after=after)
    await AuditLog().append(connection, act)


def _ago(keep: Keep) -> tuple[int, int]:
    return keep.days or 0, keep.months or 0
