"""Days and months of UTC: the periods of the budgets."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Self

_DAY_S = 86_400


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


@dataclass(frozen=True, slots=True)
class Today:
    """The day and the month of UTC that hold a moment, by name."""

    day: str
    month: str

    @classmethod
    def at(cls, wall_s: float) -> Self:
        """Return those that hold `wall_s`, in seconds since 1970."""
        return cls._of(int(wall_s // _DAY_S))

    @classmethod
    @lru_cache(maxsize=8)
    def _of(cls, days: int) -> Self:
        moment = utc(days * _DAY_S)
        return cls(Period.DAY.key(moment), Period.MONTH.key(moment))


def utc(wall_s: float) -> datetime:
    """Return the moment that `wall_s`, in seconds since 1970, means."""
    return datetime.fromtimestamp(wall_s, UTC)
