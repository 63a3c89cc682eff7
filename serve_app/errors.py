"""Every way in which a request or a start can fail, and what the client is told.

    CompAIError
    ├── ConfigError                     stops the start, never reaches a client
    └── RequestError                    becomes one OpenAI error object
        ├── InvalidRequest       400
        │   ├── MalformedBody
        │   └── UnsupportedParameter
        ├── AuthenticationFailed 401
        ├── PermissionDenied     403
        ├── NotFound             404
        │   └── ModelNotFound
        ├── MethodNotAllowed     405
        ├── BodyTooLarge         413
        ├── RateLimited          429
        ├── ClientGone           499    recorded, never sent
        ├── InternalError        500
        ├── EngineFailed         502
        ├── Unavailable          503
        │   ├── ModelOverloaded
        │   ├── ModelNotReady
        │   ├── IdentityUnavailable
        │   ├── LimitsUnavailable
        │   ├── StoreUnavailable
        │   └── LogUnavailable
        └── DeadlineExceeded     504

The docstring of a class is its default message. `to_openai` is the one place that
turns an error into a response body, in the form of
https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar


class CompAIError(Exception):
    """Comp AI failed."""

    def __init__(self, message: str | None = None) -> None:
        self.message = message or inspect.cleandoc(type(self).__doc__ or "")
        super().__init__(self.message)


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

    def __init__(
        self,
        message: str | None = None,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.param = param
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors cross process borders inside Ray; the default would lose the keywords.
        return _rebuild, (type(self), self.message, self.param, self.retry_after_s)


def _rebuild(
    cls: type[RequestError], message: str, param: str | None, retry_after_s: float | None
) -> RequestError:
    return cls(message, param=param, retry_after_s=retry_after_s)


class InvalidRequest(RequestError):
    """The request is not valid."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class MalformedBody(InvalidRequest):
    """The request body is not a JSON object."""

    code = "invalid_json"


class UnsupportedParameter(InvalidRequest):
    """A parameter of the request is not supported here."""

    code = "unsupported_parameter"


class AuthenticationFailed(RequestError):
    """No valid credential was sent. Send `Authorization: Bearer <API key or access token>`."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class PermissionDenied(RequestError):
    """This principal may not do that."""

    status = 403
    type = "permission_error"
    code = "permission_denied"


class NotFound(RequestError):
    """There is nothing at this address."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFound(NotFound):
    """The model does not exist or you may not use it."""

    code = "model_not_found"


class MethodNotAllowed(RequestError):
    """This address does not take that HTTP method."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class BodyTooLarge(RequestError):
    """The request body is larger than this service takes."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class RateLimited(RequestError):
    """A limit was reached. Try again later."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class ClientGone(RequestError):
    """The client closed the connection before the answer was complete."""

    status = 499
    type = "client_error"
    code = "client_disconnected"


class InternalError(RequestError):
    """The service failed. Try again; if it goes on, give the operator the X-Request-ID."""

    code = "internal_error"


class EngineFailed(RequestError):
    """The model failed while it served this request. Try again."""

    status = 502
    type = "api_error"
    code = "engine_error"


class Unavailable(RequestError):
    """The service cannot take this request now. Try again later."""

    status = 503
    type = "overloaded_error"
    code = "unavailable"


class ModelOverloaded(Unavailable):
    """The queue of this model is full. Try again later."""

    code = "model_overloaded"


class ModelNotReady(Unavailable):
    """No replica of this model is ready. Try again later."""

    code = "model_not_ready"


class IdentityUnavailable(Unavailable):
    """The credential cannot be checked now. Try again later."""

    code = "identity_unavailable"


class LimitsUnavailable(Unavailable):
    """The limits cannot be checked now. Try again later."""

    code = "limits_unavailable"


class StoreUnavailable(Unavailable):
    """What this request needs of the database cannot be read or kept now. Try again later."""

    code = "store_unavailable"


class LogUnavailable(Unavailable):
    """The request cannot be recorded now, so it is not served. Try again later."""

    code = "request_log_unavailable"


class DeadlineExceeded(RequestError):
    """The request was not finished before its deadline."""

    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"


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
