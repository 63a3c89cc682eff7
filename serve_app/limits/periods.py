"""Days and months of UTC: the periods of the budgets."""

from __future__ import annotations

import enum
from datetime import UTC, datetime, timedelta


class Period(enum.StrEnum):
    """For how long a budget holds."""

    DAY = "day"
    MONTH = "month"

    def key(self, moment: datetime) -> str:
        """Return the name of the period that holds `moment`; later ones sort behind it."""
        return moment.strftime("%Y-%m-%d" if self is Period.DAY else "%Y-%m")

    def ends_in_s(self, moment: datetime) -> float:
        """Return the seconds from `moment` to the end of its period."""
        midnight = moment.replace(hour=0, minute=0, second=0, microsecond=0)
        if self is Period.DAY:
            return (midnight + timedelta(days=1) - moment).total_seconds()
        next_month = (midnight.replace(day=1) + timedelta(days=32)).replace(day=1)
        return (next_month - moment).total_seconds()


def utc(wall_s: float) -> datetime:
    """Return the moment that `wall_s`, in seconds since 1970, means."""
    return datetime.fromtimestamp(wall_s, UTC)
