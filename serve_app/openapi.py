"""What the OpenAPI document says of requests that the gateway reads itself."""

from __future__ import annotations

from typing import Any

from serve_app.completions.body import PARAMETERS, Kind
from serve_app.errors import (
    AuthenticationFailed,
    BodyTooLarge,
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    ModelNotFound,
    PermissionDenied,
    RateLimited,
    RequestError,
    Unavailable,
    to_openai,
)

DESCRIPTION = (
    "OpenAI-compatible completions. Sign in with `Authorization: Bearer`, "
    "an API key (`cai-…`) or an access token of your company's issuer."
)

_ERRORS: tuple[type[RequestError], ...] = (
    InvalidRequest,
    AuthenticationFailed,
    PermissionDenied,
    ModelNotFound,
    BodyTooLarge,
    RateLimited,
    EngineFailed,
    Unavailable,
    DeadlineExceeded,
)

ANSWERS: dict[int | str, dict[str, Any]] = {
    error.status: {
        "description": error().message,
        "content": {"application/json": {"example": to_openai(error())}},
    }
    for error in _ERRORS
}

_FIELDS: dict[str, dict[str, Any]] = {
    "model": {"type": "string", "description": "Name of a model, see `GET /v1/models`."},
    "messages": {
        "type": "array",
        "items": {"type": "object"},
        "description": "The conversation: objects with `role` and `content`.",
    },
    "prompt": {"description": "A text, or a list of texts.", "type": "string"},
    "max_tokens": {"type": "integer", "minimum": 1},
    "max_completion_tokens": {"type": "integer", "minimum": 1},
    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    "top_p": {"type": "number", "minimum": 0, "maximum": 1},
    "stream": {"type": "boolean", "description": "Answer as server-sent events."},
    "stream_options": {
        "type": "object",
        "properties": {"include_usage": {"type": "boolean"}},
        "additionalProperties": False,
    },
    "n": {"type": "integer", "minimum": 1},
    "seed": {"type": "integer"},
    "stop": {"description": "A text, or up to four."},
}
_REQUIRED = {Kind.CHAT: ["model", "messages"], Kind.TEXT: ["model", "prompt"]}
_EXAMPLES: dict[Kind, dict[str, Any]] = {
    Kind.CHAT: {
        "model": "smollm2-135m-instruct",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
    },
    Kind.TEXT: {"model": "smollm2-135m-instruct", "prompt": "The capital of France is"},
}


def completion_docs(kind: Kind) -> dict[str, Any]:
    """Return what FastAPI is told of a completions endpoint whose body it does not parse."""
    schema = {
        "type": "object",
        "required": _REQUIRED[kind],
        "properties": {name: _FIELDS.get(name, {}) for name in sorted(PARAMETERS[kind])},
        "additionalProperties": False,
    }
    content = {"application/json": {"schema": schema, "example": _EXAMPLES[kind]}}
    return {
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
    }
