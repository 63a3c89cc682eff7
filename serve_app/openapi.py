"""What the OpenAPI document says of requests that the gateway reads itself."""

from __future__ import annotations

from typing import Any

from serve_app.completions.kinds import Kind
from serve_app.config import MOST_PRIORITY, Bodies
from serve_app.errors import ClientGone, RequestError, every_error, to_openai

DESCRIPTION = (
    "OpenAI-compatible completions. Sign in with `Authorization: Bearer`, "
    "an API key (`cai-…`) or an access token of your company's issuer."
)

_ERROR_REF = {"$ref": "#/components/schemas/Error"}
_HEADERS: dict[str, dict[str, Any]] = {
    "X-Request-ID": {
        "description": "Names the request in the logs and the accounts.",
        "schema": {"type": "string"},
    },
    "Server-Timing": {
        "description": "Where the time went, in ms.",
        "schema": {"type": "string"},
    },
    "Retry-After": {
        "description": "Seconds to wait before the next try.",
        "schema": {"type": "integer", "minimum": 1},
    },
    "Link": {
        "description": "The next page, where there is one (`rel=next`).",
        "schema": {"type": "string"},
    },
    "Allow": {"schema": {"type": "string"}},
    "Idempotent-Replayed": {
        "description": "On an answer that was kept for a retry.",
        "schema": {"type": "string", "const": "true"},
    },
    "WWW-Authenticate": {"schema": {"type": "string", "const": "Bearer"}},
}
_ALWAYS = ("X-Request-ID", "Server-Timing")
_MORE_HEADERS = {
    401: ("WWW-Authenticate",),
    405: ("Allow",),
    409: ("Retry-After",),
    429: ("Retry-After",),
    503: ("Retry-After",),
}


def headers(*names: str) -> dict[str, Any]:
    """Return the headers of an answer as the document describes them."""
    return {name: _HEADERS[name] for name in (*_ALWAYS, *names)}


def _sent_errors() -> list[type[RequestError]]:
    return [error for error in every_error() if error is not ClientGone]


def _refusal(status: int) -> dict[str, Any]:
    errors = [error for error in _sent_errors() if error.status == status]
    examples = {str(error.code): {"value": to_openai(error())} for error in errors}
    return {
        "description": errors[0]().message,
        "headers": headers(*_MORE_HEADERS.get(status, ())),
        "content": {"application/json": {"schema": _ERROR_REF, "examples": examples}},
    }


# Every refusal of the tree, by status.
ANSWERS: dict[int | str, dict[str, Any]] = {
    status: _refusal(status) for status in sorted({error.status for error in _sent_errors()})
}


def _error_schema() -> dict[str, Any]:
    """Return the schema of an OpenAI error object, with the codes of the tree."""
    inner: dict[str, Any] = {
        "message": {"type": "string", "minLength": 1},
        "type": {"type": "string", "enum": sorted({error.type for error in _sent_errors()})},
        "param": {"type": ["string", "null"]},
        "code": {"type": "string", "enum": [str(error.code) for error in _sent_errors()]},
    }
    error = {
        "type": "object",
        "required": list(inner),
        "properties": inner,
        "additionalProperties": False,
    }
    return {
        "type": "object",
        "required": ["error"],
        "properties": {"error": error},
        "additionalProperties": False,
    }


def completed(document: dict[str, Any]) -> dict[str, Any]:
    """Return FastAPI's document with what it cannot know put right.

    The gateway reads requests itself, so FastAPI's own refusal, 422, is never sent.
    """
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    schemas["Error"] = _error_schema()
    refusals = {str(status): answer for status, answer in ANSWERS.items()}
    for operations in document["paths"].values():
        for operation in operations.values():
            answers = operation["responses"]
            if "HTTPValidationError" in str(answers.get("422")):
                del answers["422"]
            # Again, because FastAPI drops every null, `param` in the examples among them.
            for status in answers.keys() & refusals.keys():
                if _ERROR_REF["$ref"] in str(answers[status]):
                    answers[status] = refusals[status]
    return document


_TEXTS: dict[str, Any] = {
    "description": "A text, or a list of texts.",
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "minItems": 1},
    ],
}
_FIELDS: dict[str, dict[str, Any]] = {
    "model": {"type": "string", "description": "Name of a model, see `GET /v1/models`."},
    "messages": {
        "type": "array",
        "minItems": 1,
        "items": {"type": "object"},
        "description": "The conversation: objects with `role` and `content`.",
    },
    "prompt": _TEXTS,
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
    "store": {
        "type": "boolean",
        "enum": [False],
        "description": "false: nothing is kept of prompt and answer.",
    },
    "priority": {
        "type": "integer",
        "maximum": MOST_PRIORITY,
        "description": "Your own priority or a higher number, which is served later.",
    },
    "seed": {"type": "integer"},
    "stop": {"description": "A text, or up to four."},
    "input": _TEXTS,
    "dimensions": {"type": "integer", "minimum": 1},
    "encoding_format": {"enum": ["float", "base64"]},
    "query": {
        "type": "string",
        "minLength": 1,
        "description": "What the documents are held against.",
    },
    "documents": _TEXTS,
    "top_n": {"type": "integer", "description": "How many to return; 0 is all."},
    "text_1": _TEXTS,
    "text_2": _TEXTS,
    "tokens": {"type": "array", "items": {"type": "integer", "minimum": 0}},
    "add_special_tokens": {"type": "boolean"},
    "return_token_strs": {"type": "boolean"},
}
# Beside JSON, which FastAPI names itself.
_STREAM = {
    "text/event-stream": {
        "example": 'data: {"object": "chat.completion.chunk", "choices": []}\n\ndata: [DONE]\n\n',
    }
}
_OF_KIND: dict[Kind, dict[str, dict[str, Any]]] = {
    Kind.RESPONSES: {
        "input": {"description": "A text, or a list of items."},
        "max_output_tokens": {"type": "integer", "minimum": 1},
        "store": {"type": "boolean", "description": "Keep the response; true where not named."},
        "background": {"type": "boolean", "description": "Answer at once, make it later."},
        "previous_response_id": {"type": "string", "description": "The response to continue."},
        "instructions": {"type": "string"},
    },
    Kind.TOKENIZE: {"prompt": {"type": "string", "description": "A text; or name `messages`."}},
}
_REQUIRED: dict[Kind, list[str]] = {
    Kind.CHAT: ["model", "messages"],
    Kind.TEXT: ["model", "prompt"],
    Kind.RESPONSES: ["model", "input"],
    Kind.EMBEDDINGS: ["model", "input"],
    Kind.RERANK: ["model", "query", "documents"],
    Kind.SCORE: ["model"],
    Kind.TOKENIZE: ["model"],
    Kind.DETOKENIZE: ["model", "tokens"],
}
_CHAT_MODEL = "smollm2-135m-instruct"
_OTHER_MODEL = "an-embedding-model"
_EXAMPLES: dict[Kind, dict[str, Any]] = {
    Kind.CHAT: {
        "model": _CHAT_MODEL,
        "messages": [{"role": "user", "content": "What is the capital of Japan?"}],
    },
    Kind.TEXT: {"model": _CHAT_MODEL, "prompt": "The capital of Japan is"},
    Kind.RESPONSES: {"model": _CHAT_MODEL, "input": "What is the capital of Japan?"},
    Kind.EMBEDDINGS: {"model": _OTHER_MODEL, "input": ["Paris", "London"]},
    Kind.RERANK: {"model": _OTHER_MODEL, "query": "France", "documents": ["Paris", "London"]},
    Kind.SCORE: {"model": _OTHER_MODEL, "text_1": "France", "text_2": ["Paris", "London"]},
    Kind.TOKENIZE: {"model": _CHAT_MODEL, "prompt": "The capital of Japan is"},
    Kind.DETOKENIZE: {"model": _CHAT_MODEL, "tokens": [504, 3575, 282]},
}


_IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "Names the request, so that it can be sent again and is answered once.",
    # Also takes the key in quotes, as RFC 9651 writes a string.
    "schema": {"type": "string", "pattern": "^[!#-~]{1,255}$"},
}


_BODIES = {
    "name": "X-Comp-AI-Bodies",
    "in": "header",
    "required": False,
    "description": "The most that is kept of prompt and answer. The policy may keep less.",
    "schema": {"type": "string", "enum": [word.value for word in Bodies]},
}


def _field(schema: dict[str, Any], *, required: bool) -> dict[str, Any]:
    """Return the schema of a field; one that may be left out may be null as well."""
    if required or not schema:
        return schema
    inner = {name: value for name, value in schema.items() if name != "description"}
    said = {"description": schema["description"]} if "description" in schema else {}
    return {**said, "anyOf": [inner, {"type": "null"}]} if inner else schema


def completion_docs(kind: Kind) -> dict[str, Any]:
    """Return what FastAPI is told of an endpoint whose body it does not parse."""
    endpoint = kind.endpoint
    fields = _FIELDS | _OF_KIND.get(kind, {})
    schema = {
        "type": "object",
        "required": _REQUIRED[kind],
        "properties": {
            name: _field(fields.get(name, {}), required=name in _REQUIRED[kind])
            for name in sorted(endpoint.parameters)
        },
        "additionalProperties": False,
    }
    content = {"application/json": {"schema": schema, "example": _EXAMPLES[kind]}}
    stream = _STREAM if "stream" in endpoint.parameters else {}
    also = " and ".join(f"`{address}`" for address in endpoint.addresses[1:])
    return {
        "summary": f"{endpoint.summary}.",
        "description": f"Also at {also}." if also else "",
        "operation_id": f"create_{endpoint.route.replace('.', '_')}",
        "openapi_extra": {
            "requestBody": {"required": True, "content": content},
            "responses": {"200": {"headers": headers("Idempotent-Replayed"), "content": stream}},
            "parameters": [_IDEMPOTENCY_KEY, _BODIES],
        },
    }
