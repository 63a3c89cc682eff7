"""A client of server-sent events that notes when each token came. For Locust: it only blocks.

Tokens are timed when their bytes are read, before anything is made of them. A frame counts as a
token when it carries some of the answer; role, usage and comments do not.
"""

from __future__ import annotations

import enum
import http.client
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

_READ_BYTES = 64 * 1024
_DONE = b"[DONE]"
_JSON = "application/json"
_TEXTS = ("content", "reasoning", "reasoning_content", "tool_calls")

Clock = Callable[[], float]


class End(enum.StrEnum):
    """How a request ended, as its client saw it."""

    DONE = "done"
    LEFT = "left"  # by ourselves
    REFUSED = "refused"  # by its status
    FAILED = "failed"  # by an error frame
    CUT = "cut"  # without the last frame


class Refused(Exception):
    """An answer that is an error: its status and code."""


@dataclass(slots=True, kw_only=True)
class Answer:
    """What came, and when. Times are seconds from when the request was sent."""

    end: End = End.CUT
    status: int = 0
    code: str | None = None
    retry_after_s: float | None = None
    first_token_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    total_s: float = 0.0
    size_bytes: int = 0

    @property
    def tokens(self) -> int:
        """Frames that carried some of the answer."""
        return 0 if self.first_token_s is None else len(self.gaps_s) + 1


class EventReader:
    """Takes bytes as they come and gives the data of the events that are complete."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Yield the data of each event that `chunk` completes; comments are passed over."""
        lines = (self._rest + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
        self._rest = lines.pop()
        for event in lines:
            data = [line[5:].lstrip() for line in event.split(b"\n") if line.startswith(b"data:")]
            if data:
                yield b"\n".join(data)


def read_stream(
    chunks: Iterable[bytes],
    answer: Answer,
    *,
    begun_at: float,
    clock: Clock = time.perf_counter,
    leave_after_tokens: int | None = None,
) -> None:
    """Fill `answer` with what `chunks` hold, until the last frame, or until enough tokens came."""
    reader, last_at = EventReader(), 0.0
    for chunk in chunks:
        now = clock()
        answer.size_bytes += len(chunk)
        for data in reader.feed(chunk):
            if data == _DONE:
                answer.end = End.DONE
                return
            frame = json.loads(data)
            if (error := frame.get("error")) is not None:
                answer.end, answer.code = End.FAILED, _code(error)
                return
            if not _says_something(frame):
                continue
            if answer.first_token_s is None:
                answer.first_token_s = now - begun_at
            else:
                answer.gaps_s.append(now - last_at)
            last_at = now
            if answer.tokens == leave_after_tokens:
                answer.end = End.LEFT
                return


def _says_something(frame: Mapping[str, Any]) -> bool:
    for choice in frame.get("choices", ()):
        delta = choice.get("delta") or {}
        if choice.get("text") or any(delta.get(name) for name in _TEXTS):
            return True
    return False


def _code(error: object) -> str:
    return str(error.get("code")) if isinstance(error, dict) else "unknown"


class Client:
    """One connection, kept between requests; not for two at once."""

    def __init__(self, url: str, key: str | None, *, timeout_s: float) -> None:
        self._at = urlsplit(url)
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._timeout_s = timeout_s
        self._connection: http.client.HTTPConnection | None = None

    def post(
        self, path: str, body: Mapping[str, Any] | bytes, *, leave_after_tokens: int | None = None
    ) -> Answer:
        """Send `body` and read the answer, a stream or not, to its end or until we leave.

        Raises:
            OSError: the connection could not be made, broke, or was silent for `timeout_s`.
            http.client.HTTPException: what came is no HTTP.
        """
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer, begun_at = Answer(), time.perf_counter()
        try:
            response = self._send("POST", path, sent)
            answer.status = response.status
            if response.headers.get_content_type() == "text/event-stream":
                read_stream(
                    _chunks(response),
                    answer,
                    begun_at=begun_at,
                    leave_after_tokens=leave_after_tokens,
                )
                if answer.end is End.DONE:
                    response.read()  # the end of the body, or the connection could not be kept
            else:
                _read_whole(response, answer)
        finally:
            answer.total_s = time.perf_counter() - begun_at
            if answer.end is not End.DONE:
                self.close()
        return answer

    def call(
        self, method: str, path: str, body: bytes | None = None, content_type: str = _JSON
    ) -> dict[str, Any]:
        """Return the JSON object that answers a call of the API's other addresses.

        Raises:
            Refused: the status is 400 or above.
            OSError, http.client.HTTPException: as `post` does.
        """
        response = self._send(method, path, body, content_type)
        found: dict[str, Any] = json.loads(response.read())
        if response.status >= 400:
            raise Refused(f"{response.status} {_code(found.get('error'))}")
        return found

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _send(
        self, method: str, path: str, body: bytes | None, content_type: str = _JSON
    ) -> http.client.HTTPResponse:
        fresh = self._connection is None
        connection = self._connection or self._open()
        self._connection = connection
        try:
            headers = {**self._headers, "Content-Type": content_type}
            connection.request(method, self._at.path + path, body, headers)
            return connection.getresponse()
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
            self.close()
            if fresh:
                raise
            # The server closed a connection that lay idle.
            return self._send(method, path, body, content_type)

    def _open(self) -> http.client.HTTPConnection:
        if self._at.scheme == "https":
            return http.client.HTTPSConnection(self._at.netloc, timeout=self._timeout_s)
        return http.client.HTTPConnection(self._at.netloc, timeout=self._timeout_s)


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    while chunk := response.read1(_READ_BYTES):
        yield chunk


def _read_whole(response: http.client.HTTPResponse, answer: Answer) -> None:
    whole = response.read()
    answer.size_bytes = len(whole)
    answer.end = End.DONE
    if response.status >= 400:
        answer.end = End.REFUSED
        answer.code = _code(json.loads(whole).get("error"))
        retry_after = response.headers.get("Retry-After")
        answer.retry_after_s = None if retry_after is None else float(retry_after)
