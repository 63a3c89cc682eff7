"""Server-sent events as vLLM's OpenAI layer sends them, looked at only where it must be.

A frame is `data: <JSON>` and an empty line. Every chunk of the upstream is passed on as it
came unless one of the markers below stands in it. They cannot stand inside a JSON string:
there the quotation mark would be escaped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
_BOUNDARY = b"\n\n"
_PREFIX = b"data: "
_USAGE = b'"usage":{'
_FINISH = b'"finish_reason":"'
_ERROR = b'data: {"error"'
_MARKERS = (_USAGE, _FINISH, _ERROR, b"data: [DONE]")


@dataclass(slots=True)
class Usage:
    """Tokens as the engine counted them."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class EngineError:
    """An error that the engine reported inside the stream."""

    status: int
    message: str


def read_object(raw: bytes) -> dict[str, Any]:
    """Return the JSON object in `raw`, or an empty one: what the engine sends is not ours."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return {}
    return body if isinstance(body, dict) else {}


def read_usage(body: dict[str, Any]) -> Usage | None:
    """Return the usage that an answer or a frame carries, or None."""
    usage = body.get("usage")
    if not isinstance(usage, dict):
        return None
    return Usage(int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))


def read_finish_reason(body: dict[str, Any]) -> str | None:
    """Return the finish reason of the first choice, or None."""
    for choice in _choices(body):
        if reason := choice.get("finish_reason"):
            return str(reason)
    return None


class StreamReader:
    """Cuts an upstream stream into what may be passed on, and keeps what we need of it.

    `feed` returns bytes for the client, whole frames only; the closing `[DONE]` is withheld,
    and so is the usage frame where the client did not ask for it.
    """

    def __init__(self, *, wants_usage: bool) -> None:
        self._wants_usage = wants_usage
        self._rest = b""
        self.usage: Usage | None = None
        self.finish_reason: str | None = None
        self.error: EngineError | None = None
        self.done = False
        self.frames = 0  # of the answer itself
        self.closing = DONE

    def feed(self, chunk: bytes) -> bytes:
        """Take bytes of the upstream and return what goes to the client.

        Once the engine has reported an error, it stands in `error` and nothing more comes.
        """
        data = self._rest + chunk if self._rest else chunk
        cut = data.rfind(_BOUNDARY)
        if cut < 0:
            self._rest = data
            return b""
        whole, self._rest = data[: cut + 2], data[cut + 2 :]
        if self.error is None and not any(marker in whole for marker in _MARKERS):
            self.frames += whole.count(_BOUNDARY)
            return whole
        return b"".join(self._inspect(frame) for frame in _split(whole))

    def _inspect(self, frame: bytes) -> bytes:
        if self.error is not None:
            return b""
        if frame == DONE:
            self.done = True
            return b""
        body = read_object(frame[len(_PREFIX) :])
        if frame.startswith(_ERROR):
            self.error = _engine_error(body.get("error"))
            return b""
        self.finish_reason = read_finish_reason(body) or self.finish_reason
        usage = read_usage(body)
        if usage is not None and not body.get("choices"):
            self.usage = usage
            return frame if self._wants_usage else b""
        self.frames += 1
        return frame


def error_frame(body: dict[str, Any]) -> bytes:
    """Return an OpenAI error object as a frame; the stream ends after it."""
    return _PREFIX + orjson.dumps(body) + _BOUNDARY


def comment(text: str) -> bytes:
    """Return `text`, one line, as a comment, which readers of the stream pass over."""
    return f": {text}\n\n".encode()


def pieces_of_stream(frames: bytes) -> Iterator[tuple[int, str]]:
    """Yield the texts that whole `frames` carry, each with the number of its choice."""
    for frame in _split(frames):
        for choice in _choices(read_object(frame[len(_PREFIX) :])):
            yield choice.get("index", 0), _text_of_choice(choice)


def text_of_answer(body: dict[str, Any]) -> str:
    """Return the text of a whole answer, choice by choice."""
    return "\n\n".join(_text_of_choice(choice) for choice in _choices(body))


def _choices(body: dict[str, Any]) -> list[dict[str, Any]]:
    choices = body.get("choices")
    return [c for c in choices if isinstance(c, dict)] if isinstance(choices, list) else []


def _text_of_choice(choice: dict[str, Any]) -> str:
    message = choice.get("delta") or choice.get("message") or {}
    parts = [message.get("reasoning"), message.get("content"), choice.get("text")]
    text = "".join(part for part in parts if isinstance(part, str))
    if calls := message.get("tool_calls"):
        text += orjson.dumps(calls).decode()
    return text


def _split(data: bytes) -> list[bytes]:
    return [frame + _BOUNDARY for frame in data.split(_BOUNDARY) if frame]


def _engine_error(error: object) -> EngineError:
    if not isinstance(error, dict):
        return EngineError(500, "")
    code = error.get("code")
    return EngineError(code if isinstance(code, int) else 500, str(error.get("message") or ""))
