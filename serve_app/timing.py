"""Server-Timing on answers that no step of the request path has timed."""

from __future__ import annotations

import time

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "server-timing"


def total(seconds: float) -> str:
    """Return the header's value for the whole time."""
    return f"total;dur={seconds * 1000:.2f}"


class TotalTiming:
    """ASGI middleware: says the total where the answer says nothing of its time."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        begun_s = time.perf_counter()

        async def timed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault(HEADER, total(time.perf_counter() - begun_s))
            await send(message)

        await self._app(scope, receive, timed)
