"""Which backups are kept: the newest of each of the last days, weeks and months."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

_RECENT = timedelta(days=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepScheme:
    """How many days, ISO weeks and months keep their newest backup. All are those of UTC.

    What is younger than a day is kept too, and so is the newest of all.
    """

    daily: int = 7
    weekly: int = 4
    monthly: int = 12

    def kept(self, taken: Iterable[datetime], now: datetime) -> set[datetime]:
        """Return those of `taken` that are kept."""
        newest_first = sorted(set(taken), reverse=True)
        kept = set(newest_first[:1])
        kept |= {at for at in newest_first if now - at < _RECENT}
        for period, count in (
            (lambda at: at.date(), self.daily),
            (lambda at: at.isocalendar()[:2], self.weekly),
            (lambda at: (at.year, at.month), self.monthly),
        ):
            kept |= _newest_of_each(newest_first, period, count)
        return kept


def _newest_of_each(
    newest_first: list[datetime], period: Callable[[datetime], object], count: int
) -> set[datetime]:
    """Return the newest of each of the `count` newest periods that have one."""
    newest: dict[object, datetime] = {}
    for at in newest_first:
        newest.setdefault(period(at.astimezone(UTC)), at)
    return set(list(newest.values())[:count])
