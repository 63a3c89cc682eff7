"""What goes back to the client, as ASGI messages."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping

import orjson
from starlette.types import Message, Send

from serve_app.completions.flow import Flow
from serve_app.completions.patience import Patience
from serve_app.errors import RequestError, SlowClient, to_openai
from serve_app.stored.idempotency import REPLAYED, StoredAnswer

_JSON = {"content-type": "application/json"}
STREAM_TYPE = "text/event-stream; charset=utf-8"
_STREAM = {
    "content-type": STREAM_TYPE,
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
# What one client that does not read may keep in this process, the frame at hand not counted.
_MOST_HELD_BYTES = 256 * 1024


class Reply:
    """One response, opened once and ended once.

    Everything that is sent may raise SlowClient: the client took nothing for
    `write_timeout_s`, while the buffers on the way to it were full.
    """

    def __init__(self, send: Send, write_timeout_s: float) -> None:
        self._send = send
        self._write_timeout_s = write_timeout_s
        self._patience = Patience(write_timeout_s)
        self._flow = Flow(_MOST_HELD_BYTES)
        # The answer and the comments that keep it alive come from two tasks.
        self._writing = asyncio.Lock()
        self._written_s = asyncio.get_running_loop().time()
        self.opened = False

    async def open_stream(self, headers: Mapping[str, str]) -> None:
        """Send the status and headers of a stream."""
        await self.open({**_STREAM, **headers})

    async def open(self, headers: Mapping[str, str]) -> None:
        """Send the status and headers of an answer that comes in parts."""
        self.opened = True
        await self._send_now(_start(200, headers))

    async def write(self, data: bytes) -> None:
        """Send a part of a stream, and wait while too much of it is on its way."""
        await self._send_now(_body(self._flow.part(data), more=True))
        try:
            await self._flow.room(self._write_timeout_s, self._send_nothing)
        except TimeoutError:
            raise SlowClient from None

    async def _send_nothing(self) -> None:
        await self._send(_body(b"", more=True))

    async def silent_for(self, seconds: float) -> None:
        """Return once nothing was sent for `seconds`."""
        loop = asyncio.get_running_loop()
        while True:
            left_s = self._written_s + seconds - loop.time()
            if left_s <= 0:
                return
            await asyncio.sleep(left_s)

    async def end_stream(self, data: bytes) -> None:
        """Send the last bytes of a stream."""
        await self._send_now(_body(data))

    async def whole(
        self, body: bytes, headers: Mapping[str, str], media_type: str = "application/json"
    ) -> None:
        """Send a complete answer."""
        await self._complete(200, body, {"content-type": media_type, **headers})

    async def again(self, answer: StoredAnswer, headers: Mapping[str, str]) -> None:
        """Send an answer that was kept; a stream as one, in one part."""
        stream = _STREAM if answer.media_type == STREAM_TYPE else {}
        extra = {**stream, **headers, **REPLAYED, "content-type": answer.media_type}
        await self._complete(answer.status, answer.body, extra)

    async def error(self, error: RequestError, headers: Mapping[str, str]) -> None:
        """Send `error` as a complete OpenAI error answer."""
        extra = dict(headers)
        if error.retry_after_s is not None:
            extra["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
        if error.status == 401:
            extra["www-authenticate"] = "Bearer"
        await self._complete(error.status, orjson.dumps(to_openai(error)), extra)

    def close(self) -> None:
        """Keep nothing for a client that is gone."""
        self._patience.close()

    async def _complete(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.opened = True
        size = {"content-length": str(len(body))}
        await self._send_now(_start(status, {**_JSON, **headers, **size}))
        await self._send_now(_body(body))

    async def _send_now(self, message: Message) -> None:
        try:
            async with self._writing:
                with self._patience:
                    await self._send(message)
        except TimeoutError:
            raise SlowClient from None
        self._written_s = asyncio.get_running_loop().time()
        if not message.get("more_body", True):
            self._patience.close()


def _start(status: int, headers: Mapping[str, str]) -> Message:
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": raw}


def _body(data: bytes, *, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}
