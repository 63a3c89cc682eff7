"""The tables of each class of data, and how a row of a subject under a hold is known."""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.accounts.retention.policy import DataClass
from serve_app.sql import named_queries

_HELD = """exists (
    select from comp_ai.legal_holds h
    where h.subject = p.principal_id and h.released_at is null)"""
# Whose a body is stands in its request, which is never kept for less.
_HELD_BODY = """exists (
    select from comp_ai.requests r
    join comp_ai.legal_holds h on h.subject = r.principal_id and h.released_at is null
    where r.id = p.id and r.created_at = p.created_at)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table that is partitioned by month.

    `held` is SQL that tells of a row `p` whether its subject is under a legal hold; `oldest` is
    SQL that returns the time of about the oldest row, by an index.
    """

    name: str
    time: str
    held: str = _HELD
    oldest: str

    def sql(self, name: str, **names: str) -> str:
        """Return the query `name` for this table."""
        text = named_queries("serve_app.accounts.retention", "queries.sql")[name]
        words = {"table": self.name, "time": self.time, "held": self.held, "oldest": self.oldest}
        return text.format(**(words | names))


def _usage(name: str) -> Table:
    oldest = f"select min(bucket) from {name}"  # noqa: S608 - a name of our own
    return Table(name=name, time="bucket", oldest=oldest)


TABLES: dict[DataClass, Table] = {
    DataClass.BODIES: Table(
        name="comp_ai.request_bodies",
        time="created_at",
        held=_HELD_BODY,
        # The ids are in the order of time.
        oldest="select created_at from comp_ai.request_bodies order by id limit 1",
    ),
    DataClass.REQUESTS: Table(
        name="comp_ai.requests",
        time="created_at",
        oldest="select min(created_at) from comp_ai.requests",
    ),
    DataClass.USAGE_MINUTE: _usage("comp_ai.usage_minute"),
    DataClass.USAGE_HOUR: _usage("comp_ai.usage_hour"),
    DataClass.USAGE_DAY: _usage("comp_ai.usage_day"),
}
