"""Policy: what the Serve config YAML says of the gateway, its models and its limits.

The gateway's part stands in `user_config`, so that Serve changes it in place.
"""

from __future__ import annotations

import enum
from collections.abc import Collection
from typing import Annotated, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from serve_app.errors import ConfigError

Name = Annotated[
    str, Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:-]*$")
]


_Model = TypeVar("_Model", bound=BaseModel)


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Bodies(enum.StrEnum):
    """What the log keeps of prompts and answers."""

    NONE = "none"
    FULL = "full"


class Durability(enum.StrEnum):
    """When an answer's last byte goes out: after its record is on disk, or at once."""

    SYNC = "sync"
    ASYNC = "async"


class Task(enum.StrEnum):
    """What a model is for."""

    GENERATE = "generate"
    EMBED = "embed"
    SCORE = "score"


class LimitPolicy(_Config):
    """What one principal may use. None is no limit."""

    requests_per_minute: int | None = Field(
        default=None, ge=1, le=1_000_000, description="Requests granted in any 60 s."
    )
    concurrency: int | None = Field(
        default=None, ge=1, le=100_000, description="Requests under way at once."
    )


class LimitsConfig(_Config):
    """Limits by principal; the entry of the principal wins over the default."""

    default: LimitPolicy = Field(
        default=LimitPolicy(), description="Policy of a principal that is not named below."
    )
    principals: dict[str, LimitPolicy] = Field(
        default_factory=dict, description="Policy by principal id."
    )

    def policy_of(self, principal_id: str) -> LimitPolicy:
        """Return the policy that holds for `principal_id`."""
        return self.principals.get(principal_id, self.default)


class Standing(_Config):
    """How the requests of a principal are placed among those of others."""

    priority: int = Field(
        default=0,
        ge=-1000,
        le=1000,
        description="Place in the queues of gateway and engine; the lower number is served first.",
    )
    weight: float = Field(
        default=1.0,
        gt=0,
        le=1000,
        description="Share of a busy model, beside others of the same priority.",
    )


class StandingConfig(_Config):
    """Standings by role; of several roles the lowest priority and the largest weight hold."""

    default: Standing = Field(
        default=Standing(), description="Standing of who has none of the roles below."
    )
    roles: dict[str, Standing] = Field(
        default_factory=dict, description="Standing by role, as the issuer names it."
    )
    batch: Standing = Field(
        default=Standing(priority=100, weight=0.25),
        description="Standing of requests that come out of a batch, whoever made it.",
    )

    def of(self, roles: Collection[str]) -> Standing:
        """Return the standing of a principal with `roles`."""
        held = [self.roles[role] for role in roles if role in self.roles]
        if not held:
            return self.default
        return Standing(
            priority=min(standing.priority for standing in held),
            weight=max(standing.weight for standing in held),
        )


class WhenCold(enum.StrEnum):
    """What a request gets while no replica of its model runs."""

    WAIT = "wait"
    REFUSE = "refuse"


class QueueConfig(_Config):
    """The queue in front of each model, in each gateway."""

    max_waiting: int = Field(
        default=1000, ge=1, le=100_000, description="Requests that wait for one model at once."
    )
    at_ray: int = Field(
        default=32,
        ge=1,
        le=10_000,
        description="Of those, for how many Ray is asked for a replica at once.",
    )


class ModelEntry(_Config):
    """One model that the gateway offers."""

    name: Name = Field(description="Name that clients send as `model`.")
    app: Name = Field(description="Serve application that serves it.")
    task: Task = Field(
        default=Task.GENERATE,
        description="What it is for: generate (chat and text), embed (embeddings, rerank and "
        "score) or score (rerank and score).",
    )
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Most completion tokens a request may ask for; "
        "COMP_AI_MAX_TOKENS where it is not set.",
    )
    default_max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Completion tokens of a request that names no number; "
        "the engine's own default where it is not set.",
    )
    when_cold: WhenCold = Field(
        default=WhenCold.WAIT,
        description="While no replica runs: wait up to cold_timeout_s, or refuse at once and "
        "start one.",
    )
    cold_timeout_s: float = Field(
        default=300.0, gt=0, description="Longest wait for a replica while none runs."
    )
    start_guess_s: float = Field(
        default=60.0,
        gt=0,
        description="Time that a replica takes to start, until one start was measured.",
    )


class IdempotencyConfig(_Config):
    """What is kept of requests that carry an Idempotency-Key."""

    keep_s: float = Field(
        default=24 * 3600.0,
        gt=0,
        le=366 * 24 * 3600.0,
        description="How long an answer is kept and sent again.",
    )
    max_stored_bytes: int = Field(
        default=4 * 1024 * 1024, ge=0, le=256 * 1024 * 1024, description="Longest answer kept."
    )
    claim_s: float = Field(
        default=30.0,
        gt=0,
        le=3600.0,
        description="How long a key stays taken after the gateway that worked on it died.",
    )


class GatewayConfig(_Config):
    """The gateway's policy."""

    models: tuple[ModelEntry, ...] = Field(min_length=1, description="Models on offer.")
    limits: LimitsConfig = Field(default=LimitsConfig(), description="Limits by principal.")
    standings: StandingConfig = Field(
        default=StandingConfig(), description="Priority and share by role."
    )
    idempotency: IdempotencyConfig = Field(
        default=IdempotencyConfig(), description="Requests that carry an Idempotency-Key."
    )
    queue: QueueConfig = Field(
        default=QueueConfig(), description="The queue in front of each model."
    )
    bodies: Bodies = Field(
        default=Bodies.FULL, description="Keep prompts and answers in the log (full) or not (none)."
    )
    durability: Durability = Field(
        default=Durability.SYNC,
        description="sync: the last byte waits until the record is on disk. "
        "async: it does not, and a crash can lose the record.",
    )
    deadline_s: float = Field(
        default=600.0, gt=0, description="Longest time for one request, its stream included."
    )
    queue_timeout_s: float = Field(
        default=30.0, gt=0, description="Longest wait for a replica of the model."
    )
    record_timeout_s: float = Field(
        default=30.0, gt=0, description="Longest wait for the record to be on disk."
    )
    keep_alive_s: float = Field(
        default=15.0, gt=0, description="Silence on a stream after which a comment is sent."
    )
    client_write_timeout_s: float = Field(
        default=30.0,
        gt=0,
        description="Longest wait for a client that takes nothing while its buffers are full.",
    )
    body_timeout_s: float = Field(
        default=60.0, gt=0, description="Longest wait for a request's body, once it is begun."
    )
    max_body_bytes: int = Field(
        default=4 * 1024 * 1024, ge=1024, description="Largest request body."
    )

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [model.name for model in self.models]
        if len(set(names)) != len(names):
            raise ValueError("model names must differ from each other")
        return self

    def model(self, name: str) -> ModelEntry | None:
        """Return the entry of the model called `name`, or None."""
        return next((model for model in self.models if model.name == name), None)


def parse_config(kind: type[_Model], raw: object, where: str) -> _Model:
    """Validate `raw` as a `kind`.

    Raises:
        ConfigError: naming the place under `where`, the value and what is allowed.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in (where, *first["loc"]))
        raise ConfigError(path, first["input"], first["msg"]) from None
