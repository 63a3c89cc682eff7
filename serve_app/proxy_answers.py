"""What Serve's own HTTP proxy answers, put into OpenAI's form.

Where the gateway itself cannot answer, Serve does, in plain text: a gateway replica has died
with a request in it, or none is there to take one. This stands in front of the proxy's app.
"""

from __future__ import annotations

import time

import orjson
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app import request_id, timing
from serve_app.errors import RequestError, Unavailable, to_openai

# Serve's own health and routes, for those who ask the proxy itself.
_OF_SERVE = ("/-/healthz", "/-/routes")
_RETRY_AFTER_S = 5


class OpenAIAnswers:
    """ASGI middleware: every error is an OpenAI error, and every request id is fit."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http" or scope["path"] in _OF_SERVE:
            await self._app(scope, receive, send)
            return
        headers = MutableHeaders(scope=scope)
        headers[request_id.HEADER] = request_id.fit_request_id(headers.get(request_id.HEADER))
        answer = _Answer(send, headers[request_id.HEADER])
        await self._app(scope, receive, answer.send)
        if answer.untold:
            # Serve ends so where the replica that had the request is gone.
            lost = Unavailable("The gateway was lost. Try again.", retry_after_s=1)
            await answer.send_error(lost)


class _Answer:
    """Passes an answer on, or puts another in its place."""

    def __init__(self, send: Send, an_id: str) -> None:
        self._send = send
        self._id = an_id
        self._begun_s = time.perf_counter()
        self._replaced = False
        self._started = False

    @property
    def untold(self) -> bool:
        """Whether nothing was answered."""
        return not self._started and not self._replaced

    async def send(self, message: Message) -> None:
        """Take one message of Serve's answer."""
        if message["type"] == "http.response.start":
            if (error := _error(message)) is not None:
                self._replaced = True
                await self.send_error(error)
            else:
                self._started = True
        if not self._replaced:
            await self._send(message)

    async def send_error(self, error: RequestError) -> None:
        """Answer with `error`."""
        self._replaced = True
        body = orjson.dumps(to_openai(error))
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            request_id.HEADER: self._id,
            timing.HEADER: timing.total(time.perf_counter() - self._begun_s),
        }
        if error.retry_after_s is not None:
            headers["retry-after"] = f"{error.retry_after_s:g}"
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": error.status, "headers": raw})
        await self._send({"type": "http.response.body", "body": body})


def _error(start: Message) -> RequestError | None:
    """Return what to answer in the place of an answer that is not the gateway's."""
    if start["status"] < 400 or not Headers(raw=start["headers"]).get(
        "content-type", ""
    ).startswith("text/plain"):
        return None
    # A 404 too: the gateway takes every path, so a proxy that finds none has only just started,
    # and has not heard of the gateway yet.
    return Unavailable(retry_after_s=_RETRY_AFTER_S)
