"""How long data is kept: the settings, by class of data."""

from __future__ import annotations

import enum
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

# The least and the most days of so many months.
_LEAST_DAYS, _MOST_DAYS = 28, 31


class DataClass(enum.StrEnum):
    """What is kept for a time of its own. Bodies first: they belong to requests."""

    BODIES = "bodies"
    REQUESTS = "requests"
    USAGE_MINUTE = "usage_minute"
    USAGE_HOUR = "usage_hour"
    USAGE_DAY = "usage_day"


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Keep(_Settings):
    """A time: days or months, one of the two."""

    days: int | None = Field(default=None, ge=1, le=36_500, description="Days.")
    months: int | None = Field(default=None, ge=1, le=1200, description="Calendar months, of UTC.")

    @model_validator(mode="after")
    def _one_of_the_two(self) -> Self:
        if (self.days is None) == (self.months is None):
            raise ValueError("exactly one of days and months")
        return self

    def __str__(self) -> str:
        return f"{self.days} days" if self.months is None else f"{self.months} months"

    def may_outlast(self, other: Keep) -> bool:
        """Tell whether this may be longer than `other`, in whichever months."""
        return self._days(_MOST_DAYS) > other._days(_LEAST_DAYS) and self != other

    def _days(self, days_of_month: int) -> int:
        return self.days or (self.months or 0) * days_of_month


class RetentionPolicy(_Settings):
    """How long each class of data is kept; what is not named is kept for ever."""

    bodies: Keep | None = Field(
        default=None,
        description="Prompts and answers; as long as `requests` where not set, and never longer.",
    )
    requests: Keep | None = Field(default=None, description="Who asked what when: the log.")
    usage_minute: Keep | None = Field(default=None, description="Usage by minute.")
    usage_hour: Keep | None = Field(default=None, description="Usage by hour.")
    usage_day: Keep | None = Field(default=None, description="Usage by day.")

    @model_validator(mode="after")
    def _bodies_go_first(self) -> Self:
        # A body is found by its request: by whom it is, and whether it is held.
        if self.bodies and self.requests and self.bodies.may_outlast(self.requests):
            raise ValueError(
                f"`bodies` ({self.bodies}) may be kept no longer than `requests` ({self.requests})"
            )
        return self

    def of(self, data: DataClass) -> Keep | None:
        """Return how long `data` is kept; None is for ever."""
        keep: Keep | None = getattr(self, data.value)
        return keep or (self.requests if data is DataClass.BODIES else None)
