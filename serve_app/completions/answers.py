"""How the answers of an endpoint are read: their usage, their text, and what closes a stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from serve_app.completions.sse import (
    EngineError,
    StreamReader,
    Usage,
    error_frame,
    pieces_of_stream,
    read_finish_reason,
    read_object,
    read_usage,
    text_of_answer,
)

_NO_TOKENS = Usage(0, 0)
NOTHING: Mapping[str, Any] = {}


class Reader(Protocol):
    """Cuts one upstream stream into what may be passed on, and keeps what we need of it."""

    @property
    def usage(self) -> Usage | None:
        """Tokens as the engine counted them, once it has told."""
        ...

    @property
    def finish_reason(self) -> str | None:
        """Why the answer ended, once it has."""
        ...

    @property
    def error(self) -> EngineError | None:
        """What the engine reported inside the stream; nothing more comes after it."""
        ...

    @property
    def done(self) -> bool:
        """Whether the stream came to its proper end."""
        ...

    @property
    def frames(self) -> int:
        """Frames of the answer itself that came."""
        ...

    @property
    def closing(self) -> bytes:
        """What was withheld and goes out last, when the record is safe."""
        ...

    def feed(self, chunk: bytes) -> bytes:
        """Take bytes of the upstream and return what goes to the client now."""
        ...


@dataclass(frozen=True, slots=True)
class Read:
    """What the accounts need of a whole answer."""

    usage: Usage | None
    finish_reason: str | None = None


class Answers:
    """The answers of an endpoint that generates, in the form of completions.

    `ends_early` says that an engine which is asked to end such an answer closes it with the usage
    until then. `opening_frames` is how many frames of a stream come before those with tokens.
    """

    ends_early = True

    def __init__(self, *, opening_frames: int = 0) -> None:
        self._opening_frames = opening_frames

    def reader(
        self,
        *,
        wants_usage: bool,
        told: Mapping[str, Any] = NOTHING,  # noqa: ARG002 - for those that hold such an object
    ) -> Reader:
        """Return a reader for one stream, in whose frames the fields `told` are set."""
        return StreamReader(wants_usage=wants_usage)

    def told(self, whole: bytes, fields: Mapping[str, Any]) -> bytes:  # noqa: ARG002
        """Return `whole` with `fields` set in it, which the engine does not know."""
        return whole

    def read(self, whole: bytes) -> Read:
        """Return what the accounts need of the answer `whole`."""
        body = read_object(whole)
        return Read(read_usage(body), read_finish_reason(body))

    def counted(self, usage: Usage | None, frames: int) -> Usage:
        """Return the tokens that the engine's own counters hold of an answer.

        `usage` is what the answer told, None where it broke off after `frames` frames.
        """
        if usage is None:
            # The engine died with the stream open: what it sent is all that is known. One
            # frame holds one token or more.
            return Usage(0, max(0, frames - self._opening_frames))
        if usage.completion_tokens == 0:
            # The engine counts a prompt when it is through with it, that is with the first
            # token. The accounts follow it.
            return _NO_TOKENS
        return usage

    def text(self, whole: bytes) -> str:
        """Return the text of a whole answer, for the log."""
        return text_of_answer(read_object(whole))

    def pieces(self, frames: bytes) -> Iterator[tuple[int, str]]:
        """Yield the texts in whole frames of a stream, each with the number of its choice."""
        return pieces_of_stream(frames)

    def error_frame(
        self,
        body: dict[str, Any],
        reader: Reader | None = None,  # noqa: ARG002 - for those that number their frames
    ) -> bytes:
        """Return an OpenAI error object as the last frame of the stream that `reader` read."""
        return error_frame(body)


class Pooled(Answers):
    """The answers of an endpoint that computes on prompts and generates nothing.

    The engine counts such a prompt with its result, so a prompt alone counts here. Asked to end
    early it would state prompts that it did not count, so it is not asked.
    """

    ends_early = False

    def counted(self, usage: Usage | None, frames: int) -> Usage:  # noqa: ARG002
        """See `Answers.counted`."""
        return usage or _NO_TOKENS

    def text(self, whole: bytes) -> str:
        """Return the scores."""
        body = read_object(whole)
        scores = body.get("results") or body.get("data")
        return orjson.dumps(scores).decode() if scores else ""


class Embedded(Pooled):
    """Embeddings: megabytes of numbers, so only the usage at their end is looked at."""

    _USAGE = b'"usage":'

    def read(self, whole: bytes) -> Read:
        """See `Answers.read`."""
        # The numbers, or their base64, cannot hold the mark; usage stands behind them.
        start = whole.rfind(self._USAGE)
        tail = b"{" + whole[start:] if start >= 0 else whole
        return Read(read_usage(read_object(tail)))

    def text(self, whole: bytes) -> str:  # noqa: ARG002
        """Return nothing: vectors are not kept in the log."""
        return ""


class Tokens(Answers):
    """Tokenize and detokenize: the tokenizer's work alone, which no counter of tokens sees."""

    def read(self, whole: bytes) -> Read:  # noqa: ARG002
        """See `Answers.read`."""
        return Read(_NO_TOKENS)

    def counted(self, usage: Usage | None, frames: int) -> Usage:  # noqa: ARG002
        """See `Answers.counted`."""
        return _NO_TOKENS

    def text(self, whole: bytes) -> str:
        """Return the text that tokens were turned into; tokens themselves are not kept."""
        prompt = read_object(whole).get("prompt")
        return prompt if isinstance(prompt, str) else ""
