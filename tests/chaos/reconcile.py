"""Three counts of the same requests: what clients saw, what the log holds, what engines counted."""

from __future__ import annotations

import re
import sqlite3
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import asyncpg

from serve_app.fake_journal import Counted, read_journals
from tests.chaos.storm import Storm
from tests.stack_runner import wait_until

Row = Mapping[str, Any]

_SETTLED_S = 90.0
# So long after the engine's last token a gateway may still be recording, also for a client that is
# gone: its `record_timeout_s`, and some time to get there.
_RECORDING_S = 35.0
# And so long after the kill the engine may still be at work, until its lease is found ended.
_LATE_STEPS_S = 2.0
_GIVEN_UP = re.compile(r"request ([0-9a-f-]{36}) was (?:not recorded|dropped)")
_ROWS = """
select id, request_id, outcome, prompt_tokens + completion_tokens as tokens
from comp_ai.requests where request_id = any($1)
"""


class Kept(Protocol):
    """A service whose rows, spools and words can be read."""

    @property
    def spools(self) -> Sequence[Path]:
        """Folders of the spools."""
        ...

    def rows(self, query: str, *args: object) -> list[asyncpg.Record]:
        """Run a query in the accounts."""
        ...

    def said(self) -> str:
        """Return what the service wrote to its output."""
        ...


@dataclass(frozen=True, kw_only=True)
class Account:
    """What became of the requests of one storm. Where all is well, `wrong` is empty.

    Args:
        unrecorded: requests that an engine worked on and that have no row because their gateway
            was killed. With the tokens that the engines counted for them.
        given_up: the same, because the log was away for too long: the gateway said so in its
            log, and no client was told that the answer is complete.
        cut_tokens: tokens that the engines counted beyond those in the rows: of attempts that
            failed before they told, and of answers that were cut.
    """

    completed: int
    failed: Counter[str]
    left: int
    rows: Counter[str]
    engine_tokens: int
    log_tokens: int
    unrecorded: int
    unrecorded_tokens: int
    given_up: int
    given_up_tokens: int
    cut_tokens: int
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.completed} completed, {sum(self.failed.values())} failed, {self.left} left; "
            f"rows {dict(self.rows)}; tokens: engines {self.engine_tokens}, log {self.log_tokens}, "
            f"{self.unrecorded_tokens} of {self.unrecorded} requests of killed gateways, "
            f"{self.given_up_tokens} of {self.given_up} that the log could not take, "
            f"{self.cut_tokens} of attempts that were cut; "
            + ("; ".join(self.wrong) or "0 lost, 0 doubled")
        )


def forget_counts(journals: Path) -> None:
    """Let the engines, which are idle, begin their journals anew."""
    for file in journals.glob("*.counts"):
        with file.open("r+b") as opened:
            opened.truncate(0)


def reconcile(stack: Kept, storm: Storm, journals: Path) -> Account:
    """Wait until the log has settled, and compare."""
    seen = storm.seen
    wait_until(lambda: spooled(stack.spools) == 0, "the spools are empty", _SETTLED_S)
    _wait_for_late_rows(stack, seen.asked)
    rows = stack.rows(_ROWS, seen.asked)
    return compare(storm, [dict(row) for row in rows], read_journals(journals), _given_up(stack))


def compare(
    storm: Storm, rows: Sequence[Row], counted: Mapping[str, Counted], given_up: Set[str]
) -> Account:
    """Compare what clients saw with `rows` and with what the engines counted, by row id.

    Args:
        given_up: ids of rows that a gateway said it could not write.
    """
    seen = storm.seen
    recorded = {row["id"].hex for row in rows}
    without = {key: count for key, count in counted.items() if key not in recorded}
    unrecorded = {key: count for key, count in without.items() if key not in given_up}
    log_tokens = sum(row["tokens"] for row in rows)
    engine_tokens = _tokens(counted)
    return Account(
        completed=len(seen.completed),
        failed=seen.troubles,
        left=len(seen.left),
        rows=Counter(row["outcome"] for row in rows),
        engine_tokens=engine_tokens,
        log_tokens=log_tokens,
        unrecorded=len(unrecorded),
        unrecorded_tokens=_tokens(unrecorded),
        given_up=len(without) - len(unrecorded),
        given_up_tokens=_tokens(without) - _tokens(unrecorded),
        cut_tokens=engine_tokens - _tokens(without) - log_tokens,
        wrong=[
            *_wrong_rows(storm, rows),
            *_made_up(rows, counted),
            *_unexplained(storm, unrecorded),
        ],
    )


def _tokens(counted: Mapping[str, Counted]) -> int:
    return sum(count.tokens for count in counted.values())


def _wrong_rows(storm: Storm, rows: Sequence[Row]) -> list[str]:
    """Each completed answer has its row, with its tokens; no request has two."""
    seen = storm.seen
    found = {row["request_id"]: row for row in rows}
    times = Counter(row["request_id"] for row in rows)
    wrong = [f"lost: {request_id}" for request_id in seen.completed if request_id not in found]
    wrong += [f"doubled: {request_id}" for request_id, count in times.items() if count > 1]
    for request_id, tokens in seen.completed.items():
        row = found.get(request_id)
        if row is not None and (row["outcome"], row["tokens"]) != ("completed", tokens):
            wrong.append(f"{request_id}: {row['outcome']} {row['tokens']}, seen {tokens}")
    return wrong


def _made_up(rows: Sequence[Row], counted: Mapping[str, Counted]) -> list[str]:
    """No row has tokens that no engine counted."""
    wrong = []
    for row in rows:
        count = counted.get(row["id"].hex)
        by_engines = count.tokens if count else 0
        if row["tokens"] > by_engines:
            told = f"{row['outcome']} with {row['tokens']} tokens, engines counted {by_engines}"
            wrong.append(f"{row['request_id']}: {told}")
    return wrong


def _unexplained(storm: Storm, unrecorded: Mapping[str, Counted]) -> list[str]:
    """Only what a gateway had under way when it was killed may lack its row.

    No client saw it complete: `_wrong_rows` looks after that.
    """
    return [
        f"the engines worked on {key}, which has no row, and no gateway was killed meanwhile"
        for key, count in unrecorded.items()
        if not any(
            -_LATE_STEPS_S <= kill_s - count.last_s <= _RECORDING_S
            for kill_s in storm.gateway_kills_s
        )
    ]


def _given_up(stack: Kept) -> set[str]:
    """Return the requests of which a gateway says that it could not record them."""
    return {found.replace("-", "") for found in _GIVEN_UP.findall(stack.said())}


def spooled(folders: Sequence[Path]) -> int:
    """Return how many records lie in these spools, those set aside included."""
    return sum(_rows_of(file) for folder in folders for file in folder.rglob("spool.sqlite3"))


def _rows_of(file: Path) -> int:
    try:
        connection = sqlite3.connect(f"file:{file}?mode=ro", uri=True)
        try:
            query = "select (select count(*) from spool) + (select count(*) from poison)"
            return int(connection.execute(query).fetchone()[0])
        finally:
            connection.close()
    except sqlite3.OperationalError:
        # Just being made, or locked by its owner: look again.
        return 1


def _wait_for_late_rows(stack: Kept, ids: list[str]) -> None:
    """Requests whose client is gone end a moment later: wait until no more rows come."""
    counts: list[int] = []

    def no_more() -> bool:
        try:
            counts.append(len(stack.rows(_ROWS, ids)))
        except (OSError, asyncpg.PostgresError):
            return False
        return len(counts) > 20 and len(set(counts[-20:])) == 1 and spooled(stack.spools) == 0

    wait_until(no_more, "no more rows come", _SETTLED_S)
