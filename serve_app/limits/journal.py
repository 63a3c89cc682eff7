"""The journal of the limits: on this machine's disk, what the book must know after a restart.

A row for each reservation, from its grant until two minutes after its end, and what was used
before that as a total for each account and period. SQLite in WAL mode with synchronous=NORMAL:
what was written outlives the process, and that is what has to be fast; a power cut can take the
last of it, but after one no request goes on, and windows of a minute are over.
"""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import orjson

from serve_app.contracts import Spent
from serve_app.errors import LimitsUnavailable
from serve_app.group_commit import GroupCommit
from serve_app.limits.book import LATE_S, TOMBSTONE_S, Change, Ended, Granted, Past, PeriodTotal
from serve_app.limits.periods import Period, utc

# A reservation that has ended stays until nothing can change what it used, and as long again.
_KEPT_S = 2 * TOMBSTONE_S
_KEPT_EXPIRED_S = LATE_S + TOMBSTONE_S
# In one transaction, since reservations wait meanwhile.
_FOLD_LIMIT = 2000

_PRAGMAS = ("journal_mode = wal", "synchronous = normal")
SCHEMA = """
create table if not exists journal (id text not null);
-- Until when this journal knew all that was used; no row where it never did.
create table if not exists vouched (at_s real not null);
create table if not exists reservations (
    id           text    primary key,
    accounts     text    not null,  -- JSON: a list of keys
    granted_at   real,              -- null: it ended before it was granted
    counted      integer not null,
    most_tokens  integer not null,
    most_micros  integer not null,
    ended_at     real,              -- null: it is held
    expired      integer not null,
    tokens       integer not null,
    micros       integer not null
) without rowid;
create index if not exists reservations_ended
    on reservations (expired, ended_at) where ended_at is not null;
create table if not exists totals (
    account  text    not null,
    period   text    not null,
    tokens   integer not null,
    micros   integer not null,
    primary key (account, period)
) without rowid;
"""
# Many at once, as JSON: between two statements the thread waits for the interpreter.
_GRANT = """
insert into reservations
select json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'),
       json_extract(value, '$[3]'), json_extract(value, '$[4]'), json_extract(value, '$[5]'),
       null, 0, 0, 0
from json_each(?) where true
on conflict (id) do update set ended_at = null, expired = 0, tokens = 0, micros = 0
"""
_END = """
insert into reservations
select json_extract(value, '$[0]'), json_extract(value, '$[1]'), null, 0, 0, 0,
       json_extract(value, '$[2]'), json_extract(value, '$[3]'), json_extract(value, '$[4]'),
       json_extract(value, '$[5]')
from json_each(?) where true
on conflict (id) do update set
    ended_at = excluded.ended_at, expired = excluded.expired,
    tokens = excluded.tokens, micros = excluded.micros
"""
_OVER = """
select id, accounts, ended_at, tokens, micros from reservations
where ended_at is not null and (expired = 0 and ended_at < ? or expired = 1 and ended_at < ?)
limit ?
"""
_ADD = """
insert into totals values (?, ?, ?, ?)
on conflict (account, period) do update set
    tokens = tokens + excluded.tokens, micros = micros + excluded.micros
"""
# A month is named with seven characters, a day with ten.
_FORGET = """
delete from totals
where length(period) = 7 and period < ? or length(period) = 10 and period < ?
"""


class Journal(GroupCommit):
    """The file of one Limits replica; see `GroupCommit` for opening and closing."""

    def __init__(self, folder: Path, *, lock_timeout_s: float = 30.0) -> None:
        super().__init__(
            folder,
            name="limits",
            schema=SCHEMA,
            pragmas=_PRAGMAS,
            unavailable=LimitsUnavailable,
            lock_timeout_s=lock_timeout_s,
        )

    async def identify(self) -> tuple[uuid.UUID, float]:
        """Return the name of this journal, and until when it knew all that was used.

        That is in seconds since 1970, and 0 where it never did.
        """
        return await self._do(identify)

    async def vouch(self, wall_s: float) -> None:
        """Note that this journal knows all that was used until now."""
        await self._do(lambda connection: vouch(connection, wall_s))

    async def write(self, changes: Sequence[Change]) -> None:
        """Return once `changes` would outlive this process.

        Raises:
            LimitsUnavailable: they are not known to be written.
        """
        await self._do(lambda connection: write(connection, changes))

    async def read(self) -> tuple[list[Past], list[PeriodTotal]]:
        """Return the reservations that are not folded yet, and the totals without them."""
        return await self._do(read)

    async def add(self, totals: Sequence[PeriodTotal]) -> None:
        """Add to the totals what was used before this journal was begun, or beside it."""
        await self._do(lambda connection: add(connection, totals))

    async def fold(self, wall_s: float) -> None:
        """Put what has ended for good into the totals."""
        while await self._do(lambda connection: fold(connection, wall_s)) == _FOLD_LIMIT:
            pass


def identify(connection: sqlite3.Connection) -> tuple[uuid.UUID, float]:
    """See `Journal.identify`."""
    row = connection.execute("select id from journal").fetchone()
    name = uuid.uuid4() if row is None else uuid.UUID(row[0])
    if row is None:
        connection.execute("insert into journal values (?)", (str(name),))
    [(at_s,)] = connection.execute("select coalesce(max(at_s), 0.0) from vouched")
    return name, float(at_s)


def vouch(connection: sqlite3.Connection, wall_s: float) -> None:
    """See `Journal.vouch`."""
    connection.execute("insert or replace into vouched (rowid, at_s) values (1, ?)", (wall_s,))


def write(connection: sqlite3.Connection, changes: Iterable[Change]) -> None:
    """Write `changes`, in their order; one that is written again changes nothing."""
    granted: dict[uuid.UUID, Granted] = {}
    ended: dict[uuid.UUID, Ended] = {}
    for change in changes:
        if isinstance(change, Granted):
            granted[change.id] = change
            # Of the same reservation only the last counts.
            ended.pop(change.id, None)
        else:
            ended[change.id] = change
    if granted:
        connection.execute(_GRANT, (orjson.dumps([_grant_row(g) for g in granted.values()]),))
    if ended:
        connection.execute(_END, (orjson.dumps([_end_row(e) for e in ended.values()]),))


def _grant_row(granted: Granted) -> tuple[Any, ...]:
    most = (granted.most.tokens, granted.most.cost_micros)
    return (granted.id, granted.accounts, granted.at_s, int(granted.counted), *most)


def _end_row(ended: Ended) -> tuple[Any, ...]:
    spent = (ended.spent.tokens, ended.spent.cost_micros)
    return (ended.id, ended.accounts, ended.at_s, int(ended.expired), *spent)


def read(connection: sqlite3.Connection) -> tuple[list[Past], list[PeriodTotal]]:
    """See `Journal.read`."""
    past = [_past(row) for row in connection.execute("select * from reservations")]
    totals = [
        PeriodTotal(account=account, period=period, spent=Spent(tokens=tokens, cost_micros=micros))
        for account, period, tokens, micros in connection.execute("select * from totals")
    ]
    return past, totals


def _past(
    row: tuple[str, str, float | None, int, int, int, float | None, int, int, int],
) -> Past:
    id_text, accounts_json, granted_at, counted, most_tokens, most_micros, *end = row
    ended_at, expired, tokens, micros = end
    reservation_id, accounts = uuid.UUID(id_text), tuple(orjson.loads(accounts_json))
    granted = ended = None
    if granted_at is not None:
        granted = Granted(
            id=reservation_id,
            accounts=accounts,
            most=Spent(tokens=most_tokens, cost_micros=most_micros),
            at_s=granted_at,
            counted=bool(counted),
        )
    if ended_at is not None:
        ended = Ended(
            id=reservation_id,
            accounts=accounts,
            spent=Spent(tokens=int(tokens or 0), cost_micros=int(micros or 0)),
            at_s=ended_at,
            expired=bool(expired),
        )
    return Past(granted=granted, ended=ended)


def add(connection: sqlite3.Connection, totals: Iterable[PeriodTotal]) -> None:
    """See `Journal.add`."""
    rows = [(t.account, t.period, t.spent.tokens, t.spent.cost_micros) for t in totals]
    connection.executemany(_ADD, rows)


def fold(connection: sqlite3.Connection, wall_s: float) -> int:
    """See `Journal.fold`; return how many reservations were folded, of a bounded number."""
    over = (wall_s - _KEPT_S, wall_s - _KEPT_EXPIRED_S, _FOLD_LIMIT)
    rows = connection.execute(_OVER, over).fetchall()
    sums: dict[tuple[str, str], tuple[int, int]] = {}
    for _, accounts, ended_at, tokens, micros in rows:
        for account in orjson.loads(accounts):
            for period in Period:
                key = (account, period.key(utc(ended_at)))
                before = sums.get(key, (0, 0))
                sums[key] = (before[0] + tokens, before[1] + micros)
    connection.executemany(_ADD, [(*key, *sum_) for key, sum_ in sums.items()])
    connection.executemany("delete from reservations where id = ?", [(row[0],) for row in rows])
    now = utc(wall_s)
    connection.execute(_FORGET, (Period.MONTH.key(now), Period.DAY.key(now)))
    return len(rows)
