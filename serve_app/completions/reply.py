"""What goes back to the client, as ASGI messages."""

from __future__ import annotations

import math
from collections.abc import Mapping

import orjson
from starlette.types import Send

from serve_app.errors import RequestError, to_openai

_JSON = {"content-type": "application/json"}
_STREAM = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


class Reply:
    """One response, opened once and ended once."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.opened = False

    async def open_stream(self, headers: Mapping[str, str]) -> None:
        """Send the status and headers of a stream."""
        await self.open({**_STREAM, **headers})

    async def open(self, headers: Mapping[str, str]) -> None:
        """Send the status and headers of an answer that comes in parts."""
        await self._start(200, headers)

    async def write(self, data: bytes) -> None:
        """Send a part of a stream."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end_stream(self, data: bytes) -> None:
        """Send the last bytes of a stream."""
        await self._send({"type": "http.response.body", "body": data})

    async def whole(
        self, body: bytes, headers: Mapping[str, str], media_type: str = "application/json"
    ) -> None:
        """Send a complete answer."""
        await self._complete(200, body, {"content-type": media_type, **headers})

    async def error(self, error: RequestError, headers: Mapping[str, str]) -> None:
        """Send `error` as a complete OpenAI error answer."""
        extra = dict(headers)
        if error.retry_after_s is not None:
            extra["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
        if error.status == 401:
            extra["www-authenticate"] = "Bearer"
        await self._complete(error.status, orjson.dumps(to_openai(error)), extra)

    async def _complete(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        await self._start(status, {**_JSON, **headers, "content-length": str(len(body))})
        await self._send({"type": "http.response.body", "body": body})

    async def _start(self, status: int, headers: Mapping[str, str]) -> None:
        self.opened = True
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})
