"""What stands in front of Serve's proxy: errors in OpenAI's form, ids that are fit."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

import httpx
import pytest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.proxy_answers import OpenAIAnswers

Answer = Callable[[Scope, Receive, Send], Awaitable[None]]


async def get(app: ASGIApp, path: str = "/v1/models", **headers: str) -> httpx.Response:
    """Ask `app` behind the middleware."""
    transport = httpx.ASGITransport(OpenAIAnswers(app))
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
        return await http.get(path, headers={k.replace("_", "-"): v for k, v in headers.items()})


async def lost(scope: Scope, receive: Receive, send: Send) -> None:
    """End without an answer, as Serve does where the replica is gone."""


@pytest.mark.parametrize(
    ("app", "status", "code"),
    [
        (lost, 503, "unavailable"),
        (PlainTextResponse("Deployment is unavailable", 503), 503, "unavailable"),
        (PlainTextResponse("Internal Server Error", 500), 503, "unavailable"),
        (PlainTextResponse("Path '/x' not found.", 404), 503, "unavailable"),
    ],
)
async def test_what_serve_says_comes_in_the_openai_form(
    app: ASGIApp, status: int, code: str
) -> None:
    response = await get(app, x_request_id="mine")
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert response.headers["x-request-id"] == "mine"
    assert response.headers["server-timing"].startswith("total;dur=")
    assert ("retry-after" in response.headers) is (status == 503)


@pytest.mark.parametrize(
    "app", [JSONResponse({"error": {"message": "ours"}}, 503), PlainTextResponse("fine")]
)
async def test_what_the_gateway_says_passes(app: Response) -> None:
    response = await get(app)
    assert (response.status_code, response.content) == (app.status_code, app.body)


async def test_serves_own_health_passes() -> None:
    response = await get(PlainTextResponse("no routes yet", 503), path="/-/healthz")
    assert response.text == "no routes yet"


@pytest.mark.parametrize("given", ["a-1._Z", "x" * 128])
async def test_id_that_is_fit_is_kept(given: str) -> None:
    assert await _seen(given) == given


@pytest.mark.parametrize("given", [None, "", "a b", "x" * 129, 'a"b', "ä", "a/b"])
async def test_any_other_id_is_replaced(given: str | None) -> None:
    assert re.fullmatch(r"[0-9a-f]{32}", await _seen(given))


async def _seen(given: str | None) -> str:
    seen: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend(value for name, value in scope["headers"] if name == b"x-request-id")
        await Response()(scope, receive, send)

    transport = httpx.ASGITransport(OpenAIAnswers(app))
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
        headers = {} if given is None else {"x-request-id": given.encode()}
        await http.get("/", headers=headers)
    (one,) = seen
    return one.decode()
