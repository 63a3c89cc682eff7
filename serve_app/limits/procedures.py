"""What gateways call directly at the limits."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Self

from serve_app.contracts import Allowance, Reservation, Settlement
from serve_app.direct import Handler, Procedure
from serve_app.errors import LimitsUnavailable


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowed:
    """What became of one reservation, or, without an allowance, when to ask again."""

    allowance: Allowance | None = None
    retry_after_s: float | None = None

    @classmethod
    def of(cls, answer: Allowance | LimitsUnavailable) -> Self:
        """Wrap what the limits answered."""
        if isinstance(answer, LimitsUnavailable):
            return cls(retry_after_s=answer.retry_after_s)
        return cls(allowance=answer)

    @property
    def answer(self) -> Allowance | LimitsUnavailable:
        """What the limits answered."""
        if self.allowance is None:
            return LimitsUnavailable(retry_after_s=self.retry_after_s)
        return self.allowance


RESERVE_ALL = Procedure(1, list[Reservation], list[Allowed])
# The answer says nothing: that there is one does.
SETTLE_ALL = Procedure(2, list[Settlement], bool)


def limit_handlers(
    reserve_all: Callable[[list[Reservation]], Awaitable[list[Allowance | LimitsUnavailable]]],
    settle_all: Callable[[list[Settlement]], Awaitable[None]],
) -> dict[int, Handler]:
    """Return what answers direct calls by these two."""

    async def reserve(reservations: list[Reservation]) -> list[Allowed]:
        return [Allowed.of(answer) for answer in await reserve_all(reservations)]

    async def settle(settlements: list[Settlement]) -> bool:
        await settle_all(settlements)
        return True

    return {
        RESERVE_ALL.code: RESERVE_ALL.served_by(reserve),
        SETTLE_ALL.code: SETTLE_ALL.served_by(settle),
    }
