"""The seams of the gateway: what it needs of the parts that run elsewhere.

`deployments` joins these to Ray; tests join them to plain objects.
"""

from __future__ import annotations

import enum
import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Protocol

from serve_app.config import ModelEntry, Standing
from serve_app.errors import OverLimit, QuotaExceeded, RateLimited, RequestError
from serve_app.pickled import set_state_or_defaults
from serve_app.records import RequestRecord


class RecordSink(Protocol):
    """Where the records of requests go."""

    @property
    def full(self) -> bool:
        """Whether there is no room for the records of new requests, as of a second ago."""
        ...

    async def append(self, record: RequestRecord) -> None:
        """Return once `record` survives the death of every process; safe to repeat.

        Raises:
            LogUnavailable: the record is not known to be safe.
        """
        ...


class Limit(enum.StrEnum):
    """What can be limited; the value is the name of the setting."""

    REQUESTS_PER_MINUTE = "requests_per_minute"
    TOKENS_PER_MINUTE = "tokens_per_minute"
    CONCURRENCY = "concurrency"
    TOKENS_PER_DAY = "tokens_per_day"
    TOKENS_PER_MONTH = "tokens_per_month"
    COST_PER_DAY = "cost_per_day"
    COST_PER_MONTH = "cost_per_month"

    @property
    def counts_money(self) -> bool:
        """Whether its amounts are millionths of the currency."""
        return self in (Limit.COST_PER_DAY, Limit.COST_PER_MONTH)

    def amount(self, amount: int, currency: str | None) -> str:
        """Return an amount of it for a reader: `12 tokens`, `0.5 EUR`."""
        if self.counts_money:
            return f"{Decimal(amount) / MICROS:f} {currency or ''}".rstrip()
        what = "concurrent requests" if self is Limit.CONCURRENCY else self.split("_")[0]
        return f"{amount} {what}"

    @property
    def period(self) -> str:
        """For what time it holds, as it follows an amount: ` per day`, or nothing."""
        _, per, time = self.partition("_per_")
        return f" per {time}" if per else ""


# Money is counted in millionths of the currency.
MICROS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """Something that is limited as one, with its limits as they are now. None is no limit.

    `key` names its account; `label` stands in messages, after `for`. Money is in millionths.
    """

    key: str
    label: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None
    cost_per_day: int | None = None
    cost_per_month: int | None = None

    @property
    def has_budget(self) -> bool:
        """Whether it is limited by the day or by the month."""
        budgets = (
            self.tokens_per_day,
            self.tokens_per_month,
            self.cost_per_day,
            self.cost_per_month,
        )
        return any(budget is not None for budget in budgets)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Tokens, and what they cost in millionths of the currency."""

    tokens: int = 0
    cost_micros: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """What one request may use at most, and whose limits it takes that from."""

    id: uuid.UUID
    scopes: tuple[Scope, ...]
    most: Spent = Spent()


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """What the request of a reservation did use, and the keys of the accounts that bear it."""

    id: uuid.UUID
    accounts: tuple[str, ...]
    spent: Spent


class Reason(enum.StrEnum):
    """Why a limit does not grant a request."""

    # Later there is room.
    BUSY = "busy"
    # The budget is used up, as far as this request needs it.
    SPENT = "spent"
    # It is more than the limit allows at all.
    TOO_LARGE = "too_large"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Which limit of whom did not grant a reservation, and why.

    `asked` is what the reservation would take of it, `left` what it has.
    """

    reason: Reason
    limit: Limit
    label: str
    allowed: int
    asked: int
    left: int
    retry_after_s: float

    def error(self, currency: str | None) -> RequestError:
        """Return the error that the client gets; money is in `currency`."""
        allowed = self.limit.amount(self.allowed, currency) + self.limit.period
        asked = self.limit.amount(self.asked, currency)
        seconds = math.ceil(self.retry_after_s)
        if self.reason is Reason.TOO_LARGE:
            return OverLimit(
                f"The request may take up to {asked}, which is more than the limit of {allowed} "
                f"for {self.label}. Ask for fewer tokens or send less."
            )
        if self.reason is Reason.SPENT:
            left = self.limit.amount(self.left, currency)
            return QuotaExceeded(
                f"Of the budget of {allowed} for {self.label}, {left} are left, and the request "
                f"may take up to {asked}. The budget is renewed in {seconds} s.",
                retry_after_s=self.retry_after_s,
            )
        return RateLimited(
            f"The limit of {allowed} for {self.label} is reached. Try again in {seconds} s.",
            retry_after_s=self.retry_after_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """One limit as it stands: what it allows, what is left, when all of it is there again."""

    limit: int
    remaining: int
    reset_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitState:
    """One limit of one scope as it stands; money is in millionths of the currency.

    What requests under way have reserved is not left.
    """

    scope: str
    limit: Limit
    window: Window


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """What became of a reservation, and how the limits stand after it.

    Of several scopes the window is told that has the least left; None where none is limited.
    """

    refusal: Refusal | None = None
    requests: Window | None = None
    tokens: Window | None = None


class LimitKeeper(Protocol):
    """The counters that hold across gateways."""

    async def reserve(self, reservation: Reservation) -> Allowance:
        """Take what the request may use from every scope, or say why not; safe to repeat.

        Raises:
            LimitsUnavailable: the counters cannot be reached.
        """
        ...

    async def settle(self, reservation: Reservation, spent: Spent) -> None:
        """Give back what was not used; for one that was not granted it changes nothing."""
        ...

    async def standing(self, scopes: Sequence[Scope]) -> list[LimitState]:
        """Return every limit of `scopes` as it stands; takes nothing.

        Raises:
            LimitsUnavailable: the counters cannot be reached.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseHint:
    """What the model's side may use to place a request.

    It is of the request for which a slot was asked. By the time one is granted another may be
    first, and gets it.
    """

    request_id: str
    principal_id: str
    standing: Standing
    # A replica that has just failed this request; asked for is another one.
    avoid: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseGrant:
    """A slot at one replica: where its HTTP server is, and the token that opens it.

    `may_keep` is how many leases of this replica a gateway may keep between two requests. With
    0 the token is good for one request.
    """

    address: str
    token: str
    replica_id: str
    may_keep: int = 0

    # During an update it comes from a replica of the release before.
    __setstate__ = set_state_or_defaults


class Lease(Protocol):
    """A slot that is held open until it is closed."""

    @property
    def grant(self) -> LeaseGrant:
        """Where and with what to ask."""
        ...

    def close(self) -> None:
        """Give the slot back; whatever still runs under its token is aborted. Never waits."""
        ...


class ModelState(enum.Enum):
    """How the application of a model is."""

    SERVING = enum.auto()
    # Healthy without a replica: the next request starts one.
    ASLEEP = enum.auto()
    # No replica yet, but one is on its way.
    STARTING = enum.auto()
    # Its replicas or its deployment failed.
    FAILED = enum.auto()
    ABSENT = enum.auto()
    UNKNOWN = enum.auto()

    @property
    def cold(self) -> bool:
        """Whether a request has to wait for a replica to start."""
        return self in (ModelState.ASLEEP, ModelState.STARTING)


class ModelPool(Protocol):
    """The replicas of the models. `serve_app.queueing` decides who asks it next."""

    async def open(self, model: ModelEntry, hint: LeaseHint) -> Lease:
        """Wait for a slot at a replica of `model`. If cancelled, nothing stays held.

        Raises:
            ModelOverloaded: no more can be asked for at once.
            ModelNotReady: the application is not deployed or failed.
        """
        ...

    async def state(self, model: ModelEntry) -> ModelState:
        """Tell how `model` is, as of a second ago at most."""
        ...

    async def close(self) -> None:
        """Wait until the replicas know which leases were closed."""
        ...
