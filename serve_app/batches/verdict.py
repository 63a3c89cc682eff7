"""What becomes of a line of a batch once its request was answered."""

from __future__ import annotations

from dataclasses import dataclass

import orjson

from serve_app.batches.batch import Line, LineState
from serve_app.completions.collected import Answered
from serve_app.errors import AuthenticationFailed

MAX_ATTEMPTS = 3
MAX_WAIT_S = 60.0
# A budget that is renewed in weeks may be raised before.
_LONGEST_TOLD_S = 600.0
_FIRST_WAIT_S = 1.0

# For now: a limit, or a part that is away. Waiting for it costs none of the attempts.
_NOT_NOW = frozenset({429, 503})


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The line has its result."""

    state: LineState
    status_code: int | None = None
    request_id: str | None = None
    response: bytes | None = None
    error_code: str | None = None
    error_message: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Postponed:
    """The line is to be tried again after `delay_s`."""

    attempts: int
    waits: int
    delay_s: float


Verdict = Finished | Postponed

REVOKED = Finished(
    state=LineState.FAILED,
    error_code=AuthenticationFailed.code,
    error_message="The API key that made this batch was revoked, is expired or is gone.",
)
DESTROYED = Finished(
    state=LineState.FAILED,
    error_code="text_destroyed",
    error_message="What was stored of this request was erased.",
)
CANCELLED = Finished(
    state=LineState.CANCELLED,
    error_code="batch_cancelled",
    error_message="This request was not executed because its batch was cancelled.",
)
EXPIRED = Finished(
    state=LineState.EXPIRED,
    error_code="batch_expired",
    error_message="This request could not be executed before the completion window expired.",
)


def judge(line: Line, answered: Answered) -> Verdict:
    """Decide what `answered` means for `line`."""
    if answered.status in _NOT_NOW:
        told_s = min(answered.retry_after_s or 0.0, _LONGEST_TOLD_S)
        delay_s = max(told_s, backoff_s(line.waits))
        return Postponed(attempts=line.attempts, waits=line.waits + 1, delay_s=delay_s)
    if answered.status >= 500 and line.attempts + 1 < MAX_ATTEMPTS:
        attempts = line.attempts + 1
        return Postponed(attempts=attempts, waits=line.waits, delay_s=backoff_s(line.attempts))
    return Finished(
        state=LineState.COMPLETED if answered.status == 200 else LineState.FAILED,
        status_code=answered.status,
        request_id=answered.request_id,
        response=_one_line(answered.body),
    )


def backoff_s(times: int) -> float:
    """Return how long to wait after the `times` + 1st refusal in a row."""
    return min(_FIRST_WAIT_S * 2.0 ** min(times, 16), MAX_WAIT_S)


def _one_line(body: bytes) -> bytes:
    """Return `body` as JSON without line ends; as a JSON text where it is no JSON."""
    try:
        return orjson.dumps(orjson.loads(body))
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):
        return orjson.dumps(body.decode("utf-8", "replace"))
