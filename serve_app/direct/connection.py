"""One connection to what is called."""

from __future__ import annotations

import asyncio
from itertools import count
from typing import Self

import msgspec

from serve_app.direct.procedures import ANSWERED, Answer, Asked, Door, Frame, LineLost, Procedure


class DirectConnection:
    """Carries many calls at once. Made by `open`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._numbers = count(1)
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._retired = False
        self._reading = asyncio.create_task(self._read(), name="direct-answers")

    @classmethod
    async def open(cls, door: Door) -> Self:
        """Connect to `door`. Raises OSError."""
        reader, writer = await asyncio.open_connection(door.host, door.port)
        writer.write(door.token)
        return cls(reader, writer)

    @property
    def usable(self) -> bool:
        """Whether calls may be made."""
        return not self._retired and not self._reading.done()

    async def until_lost(self, timeout_s: float) -> None:
        """Wait until it is over, or for `timeout_s`."""
        await asyncio.wait([self._reading], timeout=timeout_s)

    async def call(
        self, procedure: Procedure[Asked, Answer], asked: Asked, timeout_s: float
    ) -> Answer:
        """Return the answer. If this is cancelled, the call may be done all the same.

        A connection that does not answer in `timeout_s` is given up, with all calls on it.

        Raises:
            LineLost: it is not known whether the call was done.
        """
        number = next(self._numbers)
        waiting = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._writer.write(bytes(Frame(number, procedure.code, procedure.call(asked))))
            async with asyncio.timeout(timeout_s):
                return procedure.answer(await waiting)
        except TimeoutError:
            self.close()
            raise LineLost("There was no answer.") from None
        except msgspec.DecodeError as error:
            raise LineLost("The answer could not be read.") from error
        finally:
            self._waiting.pop(number, None)
            self._close_if_retired()

    def retire(self) -> None:
        """Close once the calls under way are answered."""
        self._retired = True
        self._close_if_retired()

    def close(self) -> None:
        """Close now; calls under way fail with LineLost."""
        self._reading.cancel()

    def _close_if_retired(self) -> None:
        if self._retired and not self._waiting:
            self.close()

    async def _read(self) -> None:
        try:
            while True:
                self._hand_out(await Frame.read(self._reader))
        except (asyncio.IncompleteReadError, OSError):
            return
        finally:
            self._writer.close()
            for waiting in self._waiting.values():
                _fail(waiting)

    def _hand_out(self, answer: Frame) -> None:
        waiting = self._waiting.get(answer.number)
        if waiting is None or waiting.done():
            return  # its caller is gone
        if answer.code == ANSWERED:
            waiting.set_result(answer.content)
        else:
            _fail(waiting)


def _fail(waiting: asyncio.Future[bytes]) -> None:
    if not waiting.done():
        waiting.set_exception(LineLost("The call failed."))
