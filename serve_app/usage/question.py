"""What is asked of the usage tables, and which of them answers it."""

from __future__ import annotations

import enum
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from serve_app.errors import InvalidRequest
from serve_app.records import utc_now


class Unit(enum.StrEnum):
    """A unit of time in which usage is added up; the largest first."""

    DAY = "day"
    HOUR = "hour"
    MINUTE = "minute"


class By(enum.StrEnum):
    """What usage is grouped by beside the time, in the order of the columns."""

    PRINCIPAL = "principal"
    MODEL = "model"
    KEY = "key"


_LENGTHS = {
    Unit.DAY: timedelta(days=1),
    Unit.HOUR: timedelta(hours=1),
    Unit.MINUTE: timedelta(minutes=1),
}
# The longest time that is added up from a table of so small a unit.
_LONGEST = {Unit.MINUTE: timedelta(days=31), Unit.HOUR: timedelta(days=366)}
# How far back a question goes that does not say.
_USUAL = {
    Unit.DAY: timedelta(days=30),
    Unit.HOUR: timedelta(days=2),
    Unit.MINUTE: timedelta(hours=2),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageQuestion:
    """Usage from `since` on and before `until`, of those who are named, by unit and groups.

    `until` None is all there is. Without a unit all the time is one.
    """

    since: datetime
    until: datetime | None = None
    unit: Unit | None = None
    by: tuple[By, ...] = ()
    principal: str | None = None
    model: str | None = None
    key: uuid.UUID | None = None

    @property
    def needs_callers(self) -> bool:
        """Whether it is about principals or keys, which the smaller tables do not have."""
        named = self.principal is not None or self.key is not None
        return named or By.PRINCIPAL in self.by or By.KEY in self.by


@dataclass(frozen=True, slots=True, kw_only=True)
class UsagePage:
    """Where a page begins, behind the row with the id `after`, and how many rows it has."""

    limit: int
    after: str | None = None
    newest_first: bool = True


def read_groups(text: str, *, most: Sequence[By] = tuple(By)) -> tuple[Unit | None, tuple[By, ...]]:
    """Return unit and groups that `text` names: `day,model`.

    Raises:
        InvalidRequest: a word that is none of them, or one too many.
    """
    words = [word.strip() for word in text.split(",")]
    units = [Unit(word) for word in words if word in set(Unit)]
    by = tuple(group for group in most if group in words)
    if len(units) > 1 or len(units) + len(by) != len(words):
        allowed = ", ".join((*most, "and one of day, hour, minute"))
        raise InvalidRequest(
            f"`group_by` must be some of {allowed}, with commas between them.", param="group_by"
        )
    return (units[0] if units else None), by


def usual_start(unit: Unit | None, now: datetime | None = None) -> datetime:
    """Return where usage begins of which the start is not named."""
    unit = unit or Unit.DAY
    return _floor((now or utc_now()) - _USUAL[unit], unit)


def source(question: UsageQuestion) -> Unit:
    """Return the largest unit of a table that has the borders of `question`.

    Raises:
        InvalidRequest: there is none, or it would have to add up too many rows.
    """
    if question.until is not None and question.until <= question.since:
        raise InvalidRequest("`to` must be later than `from`.", param="to")
    unit = _unit(question)
    span = (question.until or utc_now()) - question.since
    if (longest := _LONGEST.get(unit)) is not None and span > longest:
        raise InvalidRequest(
            f"With borders or groups of a {unit}, `from` and `to` may be {longest.days} days "
            "apart. Name full days, or a shorter time.",
            param="from",
        )
    return unit


def _unit(question: UsageQuestion) -> Unit:
    borders = [border for border in (question.since, question.until) if border is not None]
    units = list(Unit)
    for unit in units[units.index(question.unit or Unit.DAY) :]:
        if all(_floor(border, unit) == border for border in borders):
            return unit
    named = "from" if _floor(question.since, Unit.MINUTE) != question.since else "to"
    raise InvalidRequest(f"`{named}` must be a full minute.", param=named)


def _floor(time: datetime, unit: Unit) -> datetime:
    day = time.replace(hour=0, minute=0, second=0, microsecond=0)
    return time - (time - day) % _LENGTHS[unit]
