"""What no endpoint takes: unknown addresses, wrong methods, what the framework refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import Message, Send

from serve_app.errors import (
    BodyTooLarge,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    RequestError,
    to_openai,
)
from serve_app.routing import Answer, Direct, GetGateway

_FRAMEWORK: dict[int, type[RequestError]] = {
    404: NotFound,
    405: MethodNotAllowed,
    413: BodyTooLarge,
}


def add_refusals(app: FastAPI, gateway: GetGateway) -> None:
    """Answer in OpenAI's form, with a record, what none of the routes of `app` takes.

    To be called after every other route was added.
    """
    _add_unknown(app, gateway)
    _add_framework(app, gateway)
    _add_last_resort(app)


def _add_unknown(app: FastAPI, gateway: GetGateway) -> None:
    known = list(app.routes)

    async def too_large(request: Request) -> Response:
        # nginx sends here, without its body, a request that is over nginx's own limit.
        return Direct(request, _refusal(gateway, BodyTooLarge()))

    async def unknown(request: Request) -> Response:
        if methods := _methods(known, request):
            answer = _refusal(gateway, MethodNotAllowed())
            return Direct(request, _allowing(answer, ", ".join(methods)))
        return Direct(request, _refusal(gateway, NotFound()))

    methods = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"]
    options: dict[str, Any] = {"methods": methods, "include_in_schema": False}
    app.add_api_route("/-/refused/413", too_large, **options)
    app.add_api_route("/{path:path}", unknown, **options)


def _methods(known: Sequence[BaseRoute], request: Request) -> list[str]:
    """Return the methods that this path takes; none where nothing is there."""
    # A partial match is one of the path alone.
    partial = [route for route in known if route.matches(request.scope)[0] is Match.PARTIAL]
    return sorted({method for route in partial for method in getattr(route, "methods", ())})


def _add_framework(app: FastAPI, gateway: GetGateway) -> None:
    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        answer = _refusal(gateway, _FRAMEWORK.get(error.status_code, InvalidRequest)())
        allowed = (error.headers or {}).get("Allow")
        if error.status_code == 405:
            answer = _allowing(answer, allowed or "GET, HEAD")
        return Direct(request, answer)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        name = str(first["loc"][-1])
        refusal = InvalidRequest(f"`{name[:100]}`: {first['msg']}.", param=name[:100])
        return Direct(request, _refusal(gateway, refusal))

    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(RequestValidationError, invalid)


def _add_last_resort(app: FastAPI) -> None:
    # Only for what is a bug: every failure that is foreseen is answered by the gateway.
    async def internal_error(_request: Request, _error: Exception) -> JSONResponse:
        error = InternalError()
        return JSONResponse(to_openai(error), status_code=error.status)

    app.add_exception_handler(Exception, internal_error)


def _refusal(gateway: GetGateway, error: RequestError) -> Answer:
    return lambda request, send: gateway().refuse(error, "other", request, send)


def _allowing(answer: Answer, methods: str) -> Answer:
    """Return `answer` with the header that must come with 405 (RFC 9110, 15.5.6)."""

    async def allowing(request: Request, send: Send) -> None:
        async def with_header(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"allow", methods.encode())]
            await send(message)

        await answer(request, with_header)

    return allowing
