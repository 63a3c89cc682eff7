"""The seams of the gateway: what it needs of the parts that run elsewhere.

`deployments` joins these to Ray; tests join them to plain objects.
"""

from __future__ import annotations

import enum
import math
import uuid
from dataclasses import dataclass
from typing import Protocol

from serve_app.config import LimitPolicy, ModelEntry, Standing
from serve_app.errors import RateLimited
from serve_app.records import RequestRecord


class RecordSink(Protocol):
    """Where the records of requests go."""

    async def append(self, record: RequestRecord) -> None:
        """Return once `record` survives the death of every process; safe to repeat.

        Raises:
            LogUnavailable: the record is not known to be safe.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ReservationRequest:
    """What a request wants to take from its principal's limits."""

    id: uuid.UUID
    principal_id: str
    policy: LimitPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a reservation was not granted."""

    limit: str
    allowed: int
    retry_after_s: float

    def error(self) -> RateLimited:
        """Return the error that the client gets."""
        return RateLimited(
            f"The limit of {self.allowed} {self.limit} is reached. "
            f"Try again in {math.ceil(self.retry_after_s)} s.",
            retry_after_s=self.retry_after_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """One limit as it stands: what it allows, what is left, when all of it is there again."""

    limit: int
    remaining: int
    reset_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """What became of a reservation, and how the principal's limits stand after it.

    `requests` is None where requests are not limited.
    """

    refusal: Refusal | None = None
    requests: Window | None = None


class LimitKeeper(Protocol):
    """The counters that hold across gateways."""

    async def reserve(
        self, reservation_id: uuid.UUID, principal_id: str, policy: LimitPolicy
    ) -> Allowance:
        """Take one request from the principal's limits, or say why not; safe to repeat.

        Raises:
            LimitsUnavailable: the counters cannot be reached.
        """
        ...

    async def settle(self, reservation_id: uuid.UUID) -> None:
        """Give back what ends with the request; an unknown id is not an error."""
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
    """A slot at one replica: where its HTTP server is, and the token that opens it once."""

    address: str
    token: str
    replica_id: str


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
