"""A request that the gateway makes to itself, and its answer, in memory."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from starlette.requests import Request
from starlette.types import Message, Scope


@dataclass(frozen=True, slots=True)
class Answered:
    """A complete answer: HTTP status, request id, body, and when to try again."""

    status: int
    request_id: str
    body: bytes
    retry_after_s: float | None = None


class Collected:
    """An ASGI request with a body that is already there, and what is sent in answer to it."""

    def __init__(self, body: bytes, request_id: str) -> None:
        self._body = body
        self._request_id = request_id
        self._told = False
        self._status = 0
        self._retry_after_s: float | None = None
        self._parts: list[bytes] = []

    @property
    def request(self) -> Request:
        """The request."""
        scope: Scope = {
            "type": "http",
            "method": "POST",
            "path": "/",
            "query_string": b"",
            "client": None,
            "headers": [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(self._body)).encode()),
                (b"x-request-id", self._request_id.encode("latin-1")),
            ],
        }
        return Request(scope, self._receive)

    async def send(self, message: Message) -> None:
        """Take one ASGI message of the answer."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = dict(message["headers"])
            if (seconds := headers.get(b"retry-after")) is not None:
                self._retry_after_s = float(seconds)
        elif message["type"] == "http.response.body":
            # A copy, which lets go of what was sent: there is nobody to wait for.
            self._parts.append(bytes(message.get("body", b"")))

    def answered(self) -> Answered:
        """Return the answer, once all of it was sent."""
        body = b"".join(self._parts)
        return Answered(self._status, self._request_id, body, self._retry_after_s)

    async def _receive(self) -> Message:
        if not self._told:
            self._told = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        # There is nobody who could go away; who waits for it is cancelled with the request.
        await asyncio.Event().wait()
        return {"type": "http.disconnect"}
