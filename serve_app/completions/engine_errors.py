"""What an engine that does not answer says, and whose fault it is."""

from __future__ import annotations

from typing import Any

import orjson

from serve_app.errors import (
    EngineFailed,
    InvalidRequest,
    ModelNotReady,
    ModelOverloaded,
    RequestError,
)

# The engine found the request itself wrong, or does not do what it asks: 501 is what vLLM makes
# of NotImplementedError. Any other 4xx is between us and the engine: the address, the method,
# the lease and the model's name are of our making (404, 405, 403, 409), and so is its wait (408).
_OF_THE_REQUEST = frozenset({400, 413, 414, 415, 422, 501})
_BUSY = frozenset({429, 503})
_RETRY_AFTER_S = 1.0


def engine_error(status: int, message: str = "", param: str | None = None) -> RequestError:
    """Return our error for an answer of the engine that is not a success.

    Its words go to the client only where they are about the request.
    """
    if status in _OF_THE_REQUEST:
        return InvalidRequest(message or None, param=param)
    if status in _BUSY:
        return ModelOverloaded(
            "The model takes no more requests now. Try again later.", retry_after_s=_RETRY_AFTER_S
        )
    if status == 404:
        return ModelNotReady(
            "The engine behind this model does not know it, or does not serve this endpoint. "
            "Tell the operator: `engine_name` or `task` of the model may be wrong."
        )
    return EngineFailed()


def refusal_of(status: int, raw: bytes) -> RequestError:
    """Return our error for a complete answer of the engine that is not a success."""
    try:
        body: Any = orjson.loads(raw)
    except orjson.JSONDecodeError:
        body = None
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        return engine_error(status)
    param = error.get("param")
    return engine_error(
        status, str(error.get("message") or ""), param if isinstance(param, str) else None
    )
