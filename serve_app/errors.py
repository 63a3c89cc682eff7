"""Every way in which a request or a start can fail, and what the client is told.

    CompAIError
    ├── ConfigError                     stops the start, never reaches a client
    └── RequestError                    becomes one OpenAI error object
        ├── InvalidRequest       400
        │   ├── FileQuotaExceeded
        │   ├── MalformedBody
        │   ├── OverLimit
        │   └── UnsupportedParameter
        ├── AuthenticationFailed 401
        ├── PermissionDenied     403
        ├── NotFound             404
        │   ├── ModelNotFound
        │   └── ResponseNotFound
        ├── MethodNotAllowed     405
        ├── BodyTimeout          408
        ├── IdempotencyConflict  409
        │   └── AnswerNotKept
        ├── UnderLegalHold       409
        ├── BodyTooLarge         413
        ├── UnsupportedMediaType 415
        ├── IdempotencyMismatch  422
        ├── RateLimited          429
        │   └── TooManyFailedSignIns
        │   └── QuotaExceeded
        ├── ClientGone           499    recorded, never sent
        │   └── SlowClient
        ├── InternalError        500
        ├── EngineFailed         502
        ├── Unavailable          503
        │   ├── ModelOverloaded
        │   ├── ModelNotReady
        │   ├── IdentityUnavailable
        │   ├── LimitsUnavailable
        │   ├── StoreUnavailable
        │   │   └── QueryTooSlow
        │   ├── LogUnavailable
        │   └── LogFull
        └── DeadlineExceeded     504

The docstring of a class is its default message; `cause`, `remedy` and `retry_after` are what
docs/errors.md says of it (`make docs`). `to_openai` is the one place that turns an error into a
response body, in the form of https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, ClassVar


class CompAIError(Exception):
    """Comp AI failed."""

    def __init__(self, message: str | None = None) -> None:
        self.message = message or inspect.cleandoc(type(self).__doc__ or "")
        super().__init__(self.message)


class HandedOver(CompAIError):
    """Another replica does this by now: ask again, and Ray will lead there."""


class ConfigError(CompAIError):
    """The configuration is wrong.

    Args:
        setting: name of the setting as the operator writes it.
        value: the value found. Never pass a secret.
        allowed: what is allowed instead, as a phrase.
    """

    def __init__(self, setting: str, value: object, allowed: str) -> None:
        self.setting = setting
        self.value = value
        self.allowed = allowed
        super().__init__(f"{setting} is {value!r}; allowed: {allowed}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.setting, self.value, self.allowed)


class RequestError(CompAIError):
    """The request failed."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "api_error"
    code: ClassVar[str | None] = None
    # For the reference, in Markdown: why it comes, what helps, and what Retry-After says where
    # it is sent.
    cause: ClassVar[str] = ""
    remedy: ClassVar[str] = ""
    retry_after: ClassVar[str | None] = None

    def __init__(
        self,
        message: str | None = None,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        denied: str | None = None,
    ) -> None:
        super().__init__(message)
        self.param = param
        self.retry_after_s = retry_after_s
        # The permission, or `model:<name>`, that was refused. For the audit log; never sent.
        self.denied = denied

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors cross process borders inside Ray; the default would lose the keywords.
        kept = (self.message, self.param, self.retry_after_s, self.denied)
        return _rebuild, (type(self), *kept)


def _rebuild(
    cls: type[RequestError],
    message: str,
    param: str | None,
    retry_after_s: float | None,
    denied: str | None,
) -> RequestError:
    return cls(message, param=param, retry_after_s=retry_after_s, denied=denied)


class InvalidRequest(RequestError):
    """The request is not valid."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"
    cause = (
        "a field is missing or wrong; a refusal of the engine's own, such as a prompt that "
        "is too long, also comes under this code with the engine's words"
    )
    remedy = "correct the field in `param`"


class MalformedBody(InvalidRequest):
    """The request body is not a JSON object."""

    code = "invalid_json"
    cause = "the body is no JSON object, names a field twice, or is nested too deeply"
    remedy = "send a JSON object, each name in it once"


class FileQuotaExceeded(InvalidRequest):
    """Your files hold too many bytes. Delete files that you no longer need."""

    code = "file_quota_exceeded"
    cause = "with this upload your files would hold more than `files.max_bytes_per_principal`"
    remedy = "delete files that you no longer need, results of old batches among them"


class OverLimit(InvalidRequest):
    """The request may take more than a limit allows at all. Ask for fewer tokens or send less."""

    code = "request_over_limit"
    cause = (
        "what the request may take at most, [see there](architecture.md#what-a-request-reserves), "
        "is more than the whole of a limit; waiting does not help"
    )
    remedy = "ask for fewer tokens (`max_tokens`, `n`), or send a shorter prompt"


class UnsupportedParameter(InvalidRequest):
    """A parameter of the request is not supported here."""

    code = "unsupported_parameter"
    cause = "a field that would not be honoured"
    remedy = "leave it out; [what passes](api.md#parameters)"


class AuthenticationFailed(RequestError):
    """No valid credential was sent. Send `Authorization: Bearer <API key or access token>`."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"
    cause = (
        "no credential, or one that is unknown, wrong, expired, revoked, or meant for "
        "another service"
    )
    remedy = (
        "the message says which rule of a token failed; for an API key it says the same in "
        "every case, on purpose"
    )


class PermissionDenied(RequestError):
    """This principal may not do that."""

    status = 403
    type = "permission_error"
    code = "permission_denied"
    cause = (
        "the principal lacks a permission that the message names; or a key is to do more than "
        "who makes or changes it may do, and `param` names the field"
    )
    remedy = (
        "ask for a role or a group that gives it, see [access](access.md#permissions); "
        "give the key less"
    )


class NotFound(RequestError):
    """There is nothing at this address."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"
    cause = "a wrong address"
    remedy = "compare it with [the addresses](api.md)"


class ModelNotFound(NotFound):
    """The model does not exist or you may not use it."""

    code = "model_not_found"
    cause = "no such model, or one that this principal may not use; both get the same answer"
    remedy = "`GET /v1/models`"


class ResponseNotFound(NotFound):
    """The response does not exist, was not stored, or is kept no longer."""

    code = "response_not_found"
    cause = (
        "no such response: it was not stored (`store: false`, or it was not finished), was "
        "deleted, is past its time, or is somebody else's; `param` is `previous_response_id` "
        "where it, or one that it continues, was to be continued"
    )
    remedy = "create it again; send what was said before as `input`"


class MethodNotAllowed(RequestError):
    """This address does not take that HTTP method."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"
    cause = "a right address with a wrong method"
    remedy = "compare it with [the addresses](api.md)"


class BodyTimeout(RequestError):
    """The request body did not arrive in time. Send it again."""

    status = 408
    type = "invalid_request_error"
    code = "request_timeout"
    cause = "the body was not there within `body_timeout_s`"
    remedy = "send it again, in one piece"


class IdempotencyConflict(RequestError):
    """A request with this Idempotency-Key is still under way. Try again later for its answer."""

    status = 409
    type = "idempotency_error"
    code = "idempotency_key_in_use"
    cause = "the first request with this key is still being answered"
    remedy = "wait for as long as `Retry-After` says and send the same again; you get its answer"
    retry_after: ClassVar[str | None] = (
        "as long as the first request has taken until now, 30 at most"
    )


class AnswerNotKept(IdempotencyConflict):
    """The request was answered; the answer is too long to send again. Use another key."""

    code = "idempotency_answer_not_kept"
    cause = "the answer was longer than `max_stored_bytes`, so it could go out only once"
    remedy = "send it with a new key, and it is generated again"
    retry_after: ClassVar[str | None] = None


class UnderLegalHold(RequestError):
    """The subject is under a legal hold, so nothing of it is erased. Release the hold first."""

    status = 409
    type = "invalid_request_error"
    code = "legal_hold"
    cause = "an erasure of somebody whose data must stay, see [legal holds](data-rights.md)"
    remedy = "release the hold, if its reason is gone; then ask again"


class BodyTooLarge(RequestError):
    """The request body is larger than this service takes."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"
    cause = "over `max_body_bytes` of the gateway, or over nginx's limit"
    remedy = "send less"


class UnsupportedMediaType(RequestError):
    """The request body must be JSON. Send `Content-Type: application/json`."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"
    cause = "`Content-Type` names something else than JSON, or the body is compressed"
    remedy = "send plain JSON as `application/json`"


class IdempotencyMismatch(RequestError):
    """This Idempotency-Key was used for another request. Use a new key for a new request."""

    status = 422
    type = "idempotency_error"
    code = "idempotency_key_reused"
    cause = "another body, or another address, under a key that is already known"
    remedy = "make a new key for each new request; send a retry byte for byte as it was"


class RateLimited(RequestError):
    """A limit was reached. Try again later."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    cause = (
        "a limit of yours, of your key, of a group or role, or of all together; or nginx's limit "
        "for one client address"
    )
    remedy = "wait for as long as `Retry-After` says"
    retry_after: ClassVar[str | None] = (
        "requests and tokens a minute: until there is room in the window; concurrency, and what "
        "requests under way have reserved: until the oldest of them should end, as they go"
    )


class QuotaExceeded(RateLimited):
    """A budget is used up. Ask the operator for more, or wait until it is renewed."""

    type = "insufficient_quota"
    code = "insufficient_quota"
    cause = "a budget of tokens or money for the day or the month has less left than it may take"
    remedy = "ask for fewer tokens where some are left, or wait until the budget is renewed"
    retry_after = "until the day or the month ends, in UTC"


class TooManyFailedSignIns(RateLimited):
    """Too many sign-ins from your address have failed. Correct the credential, then try again."""

    code = "too_many_failed_sign_ins"
    cause = (
        "the credential is not valid, and so were more than `sign_in.failures_per_minute` others "
        "from the same address; a good credential passes all the same"
    )
    remedy = "correct the credential"
    retry_after: ClassVar[str | None] = "when another failure would be answered with 401 again"


class ClientGone(RequestError):
    """The client closed the connection before the answer was complete."""

    status = 499
    type = "client_error"
    code = "client_disconnected"
    cause = "the client closed the connection, or something between us did"
    remedy = "nobody is there to read it: it is recorded and never sent"


class SlowClient(ClientGone):
    """The client did not read its answer in time."""

    code = "client_too_slow"
    cause = (
        "the client took nothing for `client_write_timeout_s`, while all buffers on the way "
        "to it were full; the connection was closed and the engine stopped"
    )
    remedy = "read the stream as it comes; it is recorded and never sent"


class InternalError(RequestError):
    """The service failed. Try again; if it goes on, give the operator the X-Request-ID."""

    code = "internal_error"
    cause = "a fault of ours"
    remedy = "its type and place are in the logs of the gateway's replica"


class EngineFailed(RequestError):
    """The model failed while it served this request. Try again."""

    status = 502
    type = "api_error"
    code = "engine_error"
    cause = (
        "the replica broke off after its answer had begun; or it failed before that, and so did "
        "a second one, or there was none"
    )
    remedy = "send it again"


class Unavailable(RequestError):
    """The service cannot take this request now. Try again later."""

    status = 503
    type = "overloaded_error"
    code = "unavailable"
    cause = "the family of those below; the gateway raises one of these"
    remedy = "wait"


class ModelOverloaded(Unavailable):
    """The queue of this model is full. Try again later."""

    code = "model_overloaded"
    cause = (
        "`max_waiting` requests wait for this model at this gateway and none of them has to give "
        "way to this one, or this one had to give way, see [the queue](architecture.md#the-queue); "
        "or its engine takes no more"
    )
    remedy = "wait for as long as `Retry-After` says"
    retry_after = "when one that comes now would be served, see below"


class ModelNotReady(Unavailable):
    """No replica of this model is ready. Try again later."""

    code = "model_not_ready"
    cause = (
        "no replica had room within `queue_timeout_s`; or none runs, and `when_cold` is `refuse` "
        "or its start took longer than `cold_timeout_s`; or the application is not deployed or "
        "failed, or its engine knows no such model"
    )
    remedy = "wait; see [operations](operations.md#a-model-is-not-ready)"
    retry_after = "when one that comes now would be served, or the start be over, see below"


class IdentityUnavailable(Unavailable):
    """The credential cannot be checked now. Try again later."""

    code = "identity_unavailable"
    cause = (
        "PostgreSQL or the issuer is away, and nothing that is remembered answers the question; "
        "or it is asked about too many unknown keys or tokens already"
    )
    remedy = "wait"
    retry_after = "mostly until the next try of ours"


class LimitsUnavailable(Unavailable):
    """The limits cannot be checked now. Try again later."""

    code = "limits_unavailable"
    cause = (
        "the Limits replica did not answer within 30 s, or cannot write its journal; or it is new "
        "on its node, and PostgreSQL cannot tell it what was used of a budget"
    )
    remedy = "wait"
    retry_after = "10, or 5 where PostgreSQL is waited for"


class StoreUnavailable(Unavailable):
    """What this request needs of the database cannot be read or kept now. Try again later."""

    code = "store_unavailable"
    cause = "PostgreSQL is away, and the request needs what is kept there"
    remedy = "wait"
    retry_after = "mostly until the next try of ours"


class QueryTooSlow(StoreUnavailable):
    """The question took too long to answer. Ask for a shorter time, or for less."""

    code = "query_too_slow"
    cause = "a statement took longer than `POSTGRES_READ_TIMEOUT_S`"
    remedy = "ask for a shorter time, or name a principal, key or model"


class LogUnavailable(Unavailable):
    """The request cannot be recorded now, so it is not served. Try again later."""

    code = "request_log_unavailable"
    cause = "the record could not be put on disk, [see below](#when-the-record-cannot-be-kept)"
    remedy = "wait; the operator looks at the disk of the spool"


class LogFull(Unavailable):
    """There is no room to record further requests, so none are served. Try again later."""

    code = "request_log_full"
    cause = "the disk of the spool is nearly full, or cannot be written; no model was asked"
    remedy = "wait; the operator makes room on the disk of the spool"
    retry_after = "10"


class DeadlineExceeded(RequestError):
    """The request was not finished before its deadline."""

    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"
    cause = "the answer took longer than `deadline_s`"
    remedy = "ask for fewer tokens"


def every_error(base: type[RequestError] = RequestError) -> Iterator[type[RequestError]]:
    """Yield the errors of the tree below `base`, in the order in which they stand here."""
    for error in base.__subclasses__():
        if error.__module__ == __name__:
            yield error
            yield from every_error(error)


def to_openai(error: RequestError) -> dict[str, Any]:
    """Return the OpenAI error object of `error`, ready for JSON."""
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }
