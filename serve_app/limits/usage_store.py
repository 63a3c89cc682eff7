"""What was used by account and period, in PostgreSQL: where the journal is lost, this is left."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import datetime, timedelta

from serve_app.contracts import Spent
from serve_app.lazy_pool import LazyPool
from serve_app.limits.book import PeriodTotal
from serve_app.limits.periods import Period
from serve_app.sql import named_queries

# Months stay, days only as long as somebody may still ask.
_DAYS_KEPT = timedelta(days=62)


class UsageStore:
    """The table `comp_ai.limit_usage`. Every method raises LimitsUnavailable without PostgreSQL."""

    def __init__(self, pool: LazyPool) -> None:
        self._pool = pool

    async def others(self, journal: uuid.UUID, moment: datetime) -> list[PeriodTotal]:
        """Return the totals of the periods of `moment` that `journal` has not written."""
        periods = [period.key(moment) for period in Period]
        async with self._pool.connection() as connection:
            rows = await connection.fetch(_query("other_totals"), periods, journal)
        return [
            PeriodTotal(
                account=row["account"],
                period=row["period"],
                spent=Spent(tokens=row["tokens"], cost_micros=row["cost_micros"]),
            )
            for row in rows
        ]

    async def keep(self, journal: uuid.UUID, totals: Sequence[PeriodTotal]) -> None:
        """Write `totals` in the name of `journal`."""
        async with self._pool.connection() as connection:
            await connection.execute(
                _query("keep_totals"),
                [total.account for total in totals],
                [total.period for total in totals],
                [total.spent.tokens for total in totals],
                [total.spent.cost_micros for total in totals],
                journal,
            )

    async def forget(self, moment: datetime) -> None:
        """Remove the totals of days that are long over at `moment`."""
        oldest = Period.DAY.key(moment - _DAYS_KEPT)
        async with self._pool.connection() as connection:
            await connection.execute(_query("forget_days"), oldest)

    async def close(self) -> None:
        """Close the connections."""
        await self._pool.close()


def _query(name: str) -> str:
    return named_queries(__package__ or "", "queries.sql")[name]
