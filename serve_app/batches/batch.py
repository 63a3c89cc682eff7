"""A batch as it stands in PostgreSQL and as OpenAI's object; and whom it is made for."""

from __future__ import annotations

import enum
import uuid
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import orjson

from serve_app.batches.words import BatchWords
from serve_app.config import Bodies, LimitPolicy
from serve_app.identity.principal import Permission, Principal
from serve_app.records import PrincipalKind, new_id

if TYPE_CHECKING:
    import asyncpg

WINDOW = "24h"
WINDOW_S = 24 * 3600


class Status(enum.StrEnum):
    """Where a batch is.

    validating → failed
              ↘ in_progress → finalizing → completed or expired
    validating and in_progress → cancelling → cancelled
    """

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


class LineState(enum.StrEnum):
    """Where one request of a batch is; the last four are results."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


_TIMES = (
    "created_at in_progress_at expires_at finalizing_at completed_at failed_at expired_at "
    "cancelling_at cancelled_at"
).split()


@dataclass(frozen=True, slots=True)
class Counts:
    """How many requests of a batch have which result."""

    completed: int
    failed: int


def new_batch_id() -> str:
    """Return an id that sorts after those made before."""
    return f"batch_{new_id().hex}"


def batch_to_openai(
    row: asyncpg.Record, words: BatchWords, counts: Counts | None
) -> dict[str, Any]:
    """Return OpenAI's Batch object of a row; `counts` are those of its lines, while it has any."""
    times: dict[str, datetime | None] = {name: row[name] for name in _TIMES}
    return {
        "id": row["id"],
        "object": "batch",
        "endpoint": row["endpoint"],
        "model": row["model"],
        "errors": None if words.errors is None else {"object": "list", "data": words.errors},
        "input_file_id": row["input_file_id"],
        "completion_window": row["completion_window"],
        "status": row["status"],
        "output_file_id": row["output_file_id"],
        "error_file_id": row["error_file_id"],
        **{name: None if at is None else int(at.timestamp()) for name, at in times.items()},
        "request_counts": {
            "total": row["total"],
            "completed": counts.completed if counts else row["completed"],
            "failed": counts.failed if counts else row["failed"],
        },
        "metadata": words.metadata,
    }


def principal_to_json(principal: Principal) -> str:
    """Return `principal` as JSON, for its batch to be run later."""
    limits = principal.limits
    return orjson.dumps(
        {
            "id": principal.id,
            "kind": principal.kind,
            "permissions": sorted(principal.permissions),
            "models": None if principal.models is None else sorted(principal.models),
            "roles": sorted(principal.roles),
            "groups": sorted(principal.groups),
            "client_id": principal.client_id,
            "api_key_id": principal.api_key_id,
            "limits": limits.model_dump(mode="json", exclude_none=True) if limits else None,
            "bodies": principal.bodies,
        }
    ).decode()


def principal_from_json(text: str) -> Principal:
    """Return the principal that `principal_to_json` wrote."""
    raw = orjson.loads(text)
    limits = raw.get("limits")
    known = {str(permission): permission for permission in Permission}
    return Principal(
        id=raw["id"],
        kind=PrincipalKind(raw["kind"]),
        # A permission that a newer release wrote means nothing to this one.
        permissions=frozenset(known[name] for name in raw["permissions"] if name in known),
        models=None if raw["models"] is None else frozenset(raw["models"]),
        roles=frozenset(raw["roles"]),
        # An older release wrote neither groups nor client nor limits nor bodies.
        groups=frozenset(raw.get("groups", ())),
        client_id=raw.get("client_id"),
        api_key_id=None if raw["api_key_id"] is None else uuid.UUID(raw["api_key_id"]),
        limits=None if limits is None else LimitPolicy.model_validate(limits),
        bodies=None if raw.get("bodies") is None else Bodies(raw["bodies"]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenBatch:
    """A batch that still needs work. `settled`: every line has its result."""

    id: str
    owner: str
    principal: Principal
    endpoint: str
    status: Status
    input_file_id: str
    output_expires_after_s: int | None
    overdue: bool
    settled: bool

    @classmethod
    def of(cls, row: asyncpg.Record) -> OpenBatch:
        """Return the batch in a row of `open_batches`."""
        principal = principal_from_json(row["principal"])
        return cls(**{**dict(row), "principal": principal, "status": Status(row["status"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One request of a batch, taken under `claim`; without a body its key was destroyed."""

    batch: OpenBatch
    number: int
    custom_id: str
    body: bytes | None
    claim: uuid.UUID
    attempts: int
    waits: int
    revoked: bool

    @property
    def request_id(self) -> str:
        """The X-Request-ID under which it stands in the accounts."""
        return f"{self.batch.id}.{self.number}"
