"""What every part of the HTTP face is written with."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Security
from fastapi.security import HTTPBearer
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve_app.completions.gateway import Gateway
from serve_app.openapi import ANSWERS

Answer = Callable[[Request, Send], Awaitable[None]]
GetGateway = Callable[[], Gateway]

# For the document only: the gateway checks the credential itself, and records the refusal.
SIGNED_IN: dict[str, Any] = {
    "responses": ANSWERS,
    "dependencies": [Security(HTTPBearer(scheme_name="bearer", auto_error=False))],
}


class Direct(Response):
    """A response that is written by the gateway itself."""

    def __init__(self, request: Request, answer: Answer) -> None:
        super().__init__()
        self._request = request
        self._answer = answer

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Let the gateway answer."""
        await self._answer(self._request, send)
