"""The answers of the responses endpoint, whole and as the events that vLLM streams.

A frame is `event: <type>`, `data: <JSON>` and an empty line. The response object stands in the
first frames and in the last one; the others are passed on unseen. The marks below begin a line,
and a line break cannot stand inside a JSON string.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from serve_app.completions.answers import NOTHING, Answers, Read, Reader
from serve_app.completions.sse import EngineError, Usage, read_object

_BOUNDARY = b"\n\n"
_DATA = b"\ndata: "
# The frames that hold the response object.
_OPENING = (b"event: response.created\n", b"event: response.in_progress\n")
_ENDS = (b"event: response.completed\n", b"event: response.incomplete\n")
_ERRORS = (b"event: response.failed\n", b"event: error\n")
_MARKS = (*_OPENING, *_ENDS, *_ERRORS)
# One such frame holds one token or more.
_DELTA = b".delta\ndata: "


class ResponseReader:
    """Reads one stream of response events; see `Reader`. The last event is withheld."""

    def __init__(self, told: Mapping[str, Any]) -> None:
        self._rest = b""
        self._told = told
        self.closing = b""
        self.usage: Usage | None = None
        self.finish_reason: str | None = None
        self.error: EngineError | None = None
        self.done = False
        self.frames = 0  # that carry tokens
        self.events = 0  # that were passed on

    def feed(self, chunk: bytes) -> bytes:
        """Take bytes of the upstream and return what goes to the client now."""
        data = self._rest + chunk if self._rest else chunk
        cut = data.rfind(_BOUNDARY)
        if cut < 0:
            self._rest = data
            return b""
        whole, self._rest = data[: cut + 2], data[cut + 2 :]
        if self.error is None and not self.done and not any(mark in whole for mark in _MARKS):
            return self._passed(whole)
        return b"".join(self._inspect(frame) for frame in _split(whole))

    def _passed(self, frames: bytes) -> bytes:
        self.frames += frames.count(_DELTA)
        self.events += frames.count(_BOUNDARY)
        return frames

    def _inspect(self, frame: bytes) -> bytes:
        if self.error is not None or self.done:
            return b""
        if not frame.startswith(_MARKS):
            return self._passed(frame)
        body = _object_of(frame)
        if frame.startswith(_OPENING):
            return self._passed(retold(frame, self._told) if self._told else frame)
        if frame.startswith(_ENDS):
            self.done = True
            self.closing = retold(frame, self._told) if self._told else frame
            self._read_end(_response_of(body))
        else:
            self.error = _engine_error(body)
        return b""

    def _read_end(self, response: dict[str, Any]) -> None:
        read = read_response(response)
        self.usage, self.finish_reason = read.usage, read.finish_reason


class ResponseAnswers(Answers):
    """The answers of the responses endpoint."""

    def reader(
        self,
        *,
        wants_usage: bool,  # noqa: ARG002 - it always comes
        told: Mapping[str, Any] = NOTHING,
    ) -> Reader:
        """Return a reader for one stream; its last event always tells the usage."""
        return ResponseReader(told)

    def read(self, whole: bytes) -> Read:
        """See `Answers.read`."""
        return read_response(read_object(whole))

    def told(self, whole: bytes, fields: Mapping[str, Any]) -> bytes:
        """See `Answers.told`."""
        return retold(whole, fields) if fields else whole

    def text(self, whole: bytes) -> str:
        """Return the text of a whole response, for the log."""
        output = read_object(whole).get("output")
        items = output if isinstance(output, list) else []
        return "\n\n".join(filter(None, map(_text_of_item, items)))

    def pieces(self, frames: bytes) -> Iterator[tuple[int, str]]:
        """See `Answers.pieces`; a response is one choice."""
        return ((0, text) for text in _texts_of_events(frames))

    def error_frame(self, body: dict[str, Any], reader: Reader | None = None) -> bytes:
        """Return an OpenAI error object as the event that ends a stream."""
        return error_event(body, reader.events if isinstance(reader, ResponseReader) else 0)


def read_response(response: Mapping[str, Any]) -> Read:
    """Return what the accounts need of a response object."""
    usage = response.get("usage")
    if not isinstance(usage, dict):
        return Read(None, _finish_reason(response))
    counted = Usage(int(usage.get("input_tokens") or 0), int(usage.get("output_tokens") or 0))
    return Read(counted, _finish_reason(response))


def final_response(last: bytes) -> dict[str, Any]:
    """Return the response object of a whole answer, or of the last event of a stream."""
    return _response_of(_object_of(last)) if last.startswith(b"event: ") else read_object(last)


def retold(last: bytes, fields: Mapping[str, Any]) -> bytes:
    """Return a whole answer, or an event, with `fields` set in its response object."""
    if not last.startswith(b"event: "):
        return orjson.dumps({**read_object(last), **fields})
    body = _object_of(last)
    return _event(str(body.get("type")), {**body, "response": {**_response_of(body), **fields}})


def error_event(body: dict[str, Any], sequence_number: int) -> bytes:
    """Return an OpenAI error object as an event.

    It holds the error twice: flat, as the reference of the API has it, and under `error`, on
    which OpenAI's clients raise instead of handing out an event that may go unnoticed.
    """
    error = body["error"]
    flat = {"code": error["code"], "message": error["message"], "param": error["param"]}
    event = {"type": "error", "sequence_number": sequence_number, **flat, "error": error}
    return _event("error", event)


def _finish_reason(response: Mapping[str, Any]) -> str | None:
    """Return the reason in the words of completions, which the records keep."""
    if response.get("status") == "incomplete":
        return "length"
    if response.get("status") != "completed":
        return None
    output = response.get("output") or []
    called = any(isinstance(i, dict) and i.get("type") == "function_call" for i in output)
    return "tool_calls" if called else "stop"


def _event(name: str, body: Mapping[str, Any]) -> bytes:
    return b"event: " + name.encode() + _DATA + orjson.dumps(body) + _BOUNDARY


def _split(data: bytes) -> list[bytes]:
    return [frame + _BOUNDARY for frame in data.split(_BOUNDARY) if frame]


def _object_of(frame: bytes) -> dict[str, Any]:
    return read_object(frame.partition(_DATA)[2])


def _response_of(body: Mapping[str, Any]) -> dict[str, Any]:
    response = body.get("response")
    return response if isinstance(response, dict) else {}


def _engine_error(body: Mapping[str, Any]) -> EngineError:
    error = body.get("error") or _response_of(body).get("error") or body
    code, message = error.get("code"), str(error.get("message") or "")
    return EngineError(code if isinstance(code, int) else 500, message)


def _text_of_item(item: Any) -> str:
    if not isinstance(item, dict):
        return ""
    if item.get("type") == "function_call":
        return orjson.dumps({k: item.get(k) for k in ("name", "arguments")}).decode()
    parts = item.get("content") or []
    return "".join(str(part.get("text") or "") for part in parts if isinstance(part, dict))


def _texts_of_events(data: bytes) -> Iterator[str]:
    for frame in _split(data):
        body = _object_of(frame)
        if body.get("type") in ("response.output_text.delta", "response.reasoning_text.delta"):
            yield str(body.get("delta") or "")
        elif body.get("type") == "response.output_item.done":
            item = body.get("item")
            if isinstance(item, dict) and item.get("type") == "function_call":
                yield _text_of_item(item)
