"""One request on its way: what is known of it so far, and the record made of that."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from datetime import datetime

from serve_app.completions.answers import Answers
from serve_app.completions.sse import Usage
from serve_app.completions.transcript import Transcript
from serve_app.config import Bodies, ModelEntry
from serve_app.contracts import Allowance, Lease, LeaseGrant, Reservation, Spent
from serve_app.errors import (
    ClientGone,
    DeadlineExceeded,
    InternalError,
    PermissionDenied,
    RequestError,
)
from serve_app.identity.principal import Principal
from serve_app.queueing.ticket import Ticket
from serve_app.records import Outcome, RequestRecord, new_id, utc_now
from serve_app.timing import UNTIMED, Lap, Stage, Timings
from serve_app.tracing.context import SpanContext
from serve_app.tracing.sampling import RequestTrace


@dataclass(slots=True, kw_only=True)
class Exchange:
    """The account of one request while it is under way."""

    route: str
    request_id: str
    client_address: str | None
    id: uuid.UUID = field(default_factory=new_id)
    created_at: datetime = field(default_factory=utc_now)
    started_s: float = field(default_factory=time.perf_counter)
    timings: Timings = field(default_factory=Timings)
    # Its place in a trace; None while tracing is off.
    trace: RequestTrace | None = None
    principal: Principal | None = None
    model: str | None = None
    stream: bool = False
    answers: Answers = field(default_factory=Answers)
    request_body: bytes | None = None
    # What is kept of it; None where there is nothing to keep.
    bodies: Bodies | None = None
    # Of the body, where no more is kept.
    shape: str | None = None
    # Set before the call goes out, so that a request that dies in it still gives back.
    reservation: Reservation | None = None
    # Whose prices hold.
    priced: ModelEntry | None = None
    allowance: Allowance = field(default_factory=Allowance)
    ticket: Ticket | None = None
    lease: Lease | None = None
    # Of every lease it had, the last one last.
    grants: list[LeaseGrant] = field(default_factory=list)
    status: int = 200
    error: RequestError | None = None
    usage: Usage | None = None
    finish_reason: str | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    frames: int = 0
    # What the engine said, whole or as a stream.
    answer: bytes = b""
    transcript: Transcript | None = None
    # Tokens of an attempt before this one, which failed.
    lost: Usage = field(default_factory=lambda: Usage(0, 0))

    @property
    def elapsed_s(self) -> float:
        """Seconds since the request came in."""
        return time.perf_counter() - self.started_s

    def traced(self, stage: Stage) -> Lap:
        """Return a block that times a pass of `stage`, if the request is traced.

        For the stages that stand in a trace alone: else they cost nothing.
        """
        if self.trace is None or not self.trace.own.sampled:
            return UNTIMED
        return self.timings.lap(stage)

    def below(self, lap: Lap) -> SpanContext | None:
        """Return the span of a stage, for what it calls elsewhere; None while tracing is off."""
        return None if self.trace is None else self.trace.below(lap)

    def token_arrived(self) -> None:
        """Note that the engine sent tokens now."""
        now = time.perf_counter()
        if self.first_token_s is None:
            self.first_token_s = now
            self.timings.time_to_first_token_s = now - self.started_s
        self.last_token_s = now

    def fail(self, error: RequestError) -> None:
        """Note why the request ended early; the first reason stays."""
        if self.error is None:
            self.error = error
            self.status = error.status

    def leave_attempt(self) -> None:
        """Make room for the account of another attempt; what this one cost is kept."""
        self.lost = self._usage()
        self.usage, self.finish_reason, self.frames = None, None, 0
        self.answer, self.transcript = b"", None

    def _usage(self) -> Usage:
        counted = self.answers.counted(self.usage, self.frames)
        return Usage(
            self.lost.prompt_tokens + counted.prompt_tokens,
            self.lost.completion_tokens + counted.completion_tokens,
        )

    def spent(self) -> Spent:
        """Return what the request used, as its record says it."""
        usage = self._usage()
        tokens = (usage.prompt_tokens, usage.completion_tokens)
        cost_micros = 0 if self.priced is None else self.priced.cost_micros(*tokens)
        return Spent(tokens=sum(tokens), cost_micros=cost_micros)

    def record(self, recording: SpanContext | None = None) -> RequestRecord:
        """Return the row of this request; `recording` is the span of the stage that needs it."""
        usage = self._usage()
        principal = self.principal
        return RequestRecord(
            id=self.id,
            request_id=self.request_id,
            created_at=self.created_at,
            route=self.route,
            status=self.status,
            outcome=self._outcome(),
            error_code=self.error.code if self.error else None,
            principal_id=principal.id if principal else None,
            principal_kind=principal.kind if principal else None,
            api_key_id=principal.api_key_id if principal else None,
            client_address=self.client_address,
            model=self.model,
            stream=self.stream,
            finish_reason=self.finish_reason,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cost_micros=self.spent().cost_micros,
            auth_ms=_ms(self.timings.auth_s),
            limits_ms=_ms(self.timings.limits_s),
            queue_ms=_ms(self.timings.queue_s),
            time_to_first_token_ms=_ms(self.timings.time_to_first_token_s),
            inter_token_mean_ms=self._inter_token_mean_ms(usage),
            duration_ms=round(self.elapsed_s * 1000, 3),
            denied=self._denied(),
            replica_id=self.lease.grant.replica_id if self.lease else None,
            bodies=self.bodies,
            request_body=self._request_text(),
            response_text=self._answer_text(),
            traceparent=recording.traceparent if recording and recording.sampled else None,
        )

    def _denied(self) -> str | None:
        if self.error is None or self.principal is None:
            return None
        if isinstance(self.error, PermissionDenied):
            return self.error.denied or self.error.code
        return self.error.denied

    def _outcome(self) -> Outcome:
        if self.error is None:
            return Outcome.COMPLETED
        if isinstance(self.error, ClientGone):
            return Outcome.CANCELLED
        if isinstance(self.error, DeadlineExceeded):
            return Outcome.TIMED_OUT
        # Asked of the engine and not finished is a failure, not a refusal; but an engine that
        # finds the request itself wrong refuses it.
        if isinstance(self.error, InternalError):
            return Outcome.FAILED
        if self.error.status >= 500 and self.lease is not None:
            return Outcome.FAILED
        return Outcome.REFUSED

    def _inter_token_mean_ms(self, usage: Usage) -> float | None:
        if self.first_token_s is None or self.last_token_s is None or usage.completion_tokens < 2:
            return None
        spread_s = self.last_token_s - self.first_token_s
        return _ms(spread_s / (usage.completion_tokens - 1)) if self.stream else None

    @property
    def _keeps_texts(self) -> bool:
        return self.bodies is not None and self.bodies.keeps_texts

    def _request_text(self) -> str | None:
        if self.bodies is Bodies.METADATA:
            return self.shape
        if not self._keeps_texts or self.request_body is None:
            return None
        return self.request_body.decode("utf-8", "replace")

    def _answer_text(self) -> str | None:
        if not self._keeps_texts:
            return None
        if self.stream:
            return None if self.transcript is None else self.transcript.text
        return self.answers.text(self.answer) if self.answer else None


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)
