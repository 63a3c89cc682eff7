"""The account of one request: what the log keeps."""

from __future__ import annotations

import enum
import os
import time
import uuid
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any, Self

import orjson


class Outcome(enum.StrEnum):
    """How a request ended. Contract 1 of the design: every end leaves a row."""

    COMPLETED = "completed"
    REFUSED = "refused"  # by us, before the engine was asked
    FAILED = "failed"  # the engine or a part of ours failed
    CANCELLED = "cancelled"  # the client went away
    TIMED_OUT = "timed_out"


class PrincipalKind(enum.StrEnum):
    """What kind of caller a principal is."""

    USER = "user"
    SERVICE = "service"
    API_KEY = "api_key"


def new_id() -> uuid.UUID:
    """Return a UUID version 7 (RFC 9562): ordered by time, so that index pages stay hot."""
    millis = time.time_ns() // 1_000_000
    value = (millis << 80) | int.from_bytes(os.urandom(10), "big")
    value = (value & ~(0xF << 76)) | (0x7 << 76)
    value = (value & ~(0x3 << 62)) | (0x2 << 62)
    return uuid.UUID(int=value)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """One row of `comp_ai.requests` and, where the policy keeps bodies, of `request_bodies`.

    `id` is ours and unique; `request_id` is the X-Request-ID that the client saw, which a
    client may choose and repeat. Times that were never reached are None.
    """

    id: uuid.UUID
    request_id: str
    created_at: datetime
    route: str
    status: int
    outcome: Outcome
    error_code: str | None = None
    principal_id: str | None = None
    principal_kind: PrincipalKind | None = None
    api_key_id: uuid.UUID | None = None
    client_address: str | None = None
    model: str | None = None
    stream: bool = False
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_micros: int = 0
    auth_ms: float | None = None
    limits_ms: float | None = None
    queue_ms: float | None = None
    time_to_first_token_ms: float | None = None
    inter_token_mean_ms: float | None = None
    duration_ms: float = 0.0
    replica_id: str | None = None
    # The permission, or `model:<name>`, that the principal lacks; the client is not told which.
    denied: str | None = None
    # What the policy keeps of the two texts: none, metadata, redacted or full.
    bodies: str | None = None
    request_body: str | None = None
    response_text: str | None = None
    # Of the span that records it, where the request is traced: the log hangs its own below.
    traceparent: str | None = None

    @property
    def trace_id(self) -> str | None:
        """The id of its trace; None where the request is not traced."""
        return None if self.traceparent is None else self.traceparent[3:35]

    @property
    def has_texts(self) -> bool:
        """Whether something of prompt or answer is kept."""
        return self.request_body is not None or self.response_text is not None

    def to_json(self, **more: Any) -> bytes:
        """Return the record as JSON, with the fields `more` beside its own.

        What stands as it would without being named is left out: so the release before, after
        a rollback, takes most records that were spooled here, though it lacks a field.
        """
        # Not `asdict`, which copies every value: this is on the way of each request.
        named = {n: v for n, usual in _USUAL.items() if (v := getattr(self, n)) != usual}
        return orjson.dumps(named | more)

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Rebuild a record from `to_json`.

        Raises:
            ValueError: if `data` is not such a record.
        """
        return cls.from_dict(orjson.loads(data))

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Self:
        """Rebuild a record from the object that `to_json` writes.

        Raises:
            ValueError: if `raw` is not such a record.
        """
        unknown = raw.keys() - cls.__dataclass_fields__.keys()
        if unknown:
            raise ValueError(f"unknown record fields: {sorted(unknown)}")
        try:
            raw["id"] = uuid.UUID(raw["id"])
            raw["created_at"] = datetime.fromisoformat(raw["created_at"])
            raw["outcome"] = Outcome(raw["outcome"])
            if raw.get("principal_kind") is not None:
                raw["principal_kind"] = PrincipalKind(raw["principal_kind"])
            if raw.get("api_key_id") is not None:
                raw["api_key_id"] = uuid.UUID(raw["api_key_id"])
            return cls(**raw)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a request record: {type(error).__name__}") from error


_USUAL = {f.name: f.default for f in fields(RequestRecord)}


def utc_now() -> datetime:
    """Return the present time with its zone."""
    return datetime.now(UTC)
