"""What can be called directly, and how it is written on the wire.

The caller opens with the door's token. Then both sides send frames: a header of 13 bytes, which is
the size of what follows, the number of the call and a code, in network order; then MessagePack.
The code of a call is its procedure's, that of an answer says whether it is one. Fields that the
other side does not know are passed over, and those that it leaves out have their defaults.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import msgspec

from serve_app.errors import CompAIError

TOKEN_BYTES = 32
ANSWERED = 0
FAILED = 1

_HEADER = struct.Struct("!IQB")

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")
Handler = Callable[[bytes], Awaitable[bytes]]


class LineLost(CompAIError):
    """There is no connection, or it was lost: it is not known whether the call was done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """Where a process takes direct calls, and the token that lets in."""

    host: str
    port: int
    token: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Frame:
    """One call or one answer."""

    number: int
    code: int
    content: bytes

    def __bytes__(self) -> bytes:
        return _HEADER.pack(len(self.content), self.number, self.code) + self.content

    @classmethod
    async def read(cls, reader: asyncio.StreamReader) -> Frame:
        """Read the next one. Raises IncompleteReadError or OSError where there is none."""
        size_bytes, number, code = _HEADER.unpack(await reader.readexactly(_HEADER.size))
        return cls(number, code, await reader.readexactly(size_bytes))


class Procedure(Generic[Asked, Answer]):
    """Something that can be called directly.

    Args:
        code: says which it is on the wire; 0 to 255.
        asked: type of what is sent.
        answer: type of what comes back.
    """

    def __init__(self, code: int, asked: type[Asked], answer: type[Answer]) -> None:
        self.code = code
        self._asked = msgspec.msgpack.Decoder(asked)
        self._answer = msgspec.msgpack.Decoder(answer)

    def call(self, asked: Asked) -> bytes:
        """Return `asked` as it is sent."""
        return msgspec.msgpack.encode(asked)

    def answer(self, content: bytes) -> Answer:
        """Read an answer. Raises msgspec.DecodeError where it is none."""
        return self._answer.decode(content)

    def served_by(self, work: Callable[[Asked], Awaitable[Answer]]) -> Handler:
        """Return what answers a call with what `work` returns."""

        async def handle(content: bytes) -> bytes:
            return msgspec.msgpack.encode(await work(self._asked.decode(content)))

        return handle
