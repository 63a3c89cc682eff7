"""One try at one replica: the answer as it comes in, and what it cost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp

from serve_app.background import stop_tasks
from serve_app.completions.answers import Reader
from serve_app.completions.body import Ask
from serve_app.completions.engine_errors import engine_error
from serve_app.completions.exchange import Exchange
from serve_app.completions.parts import Spawn
from serve_app.completions.transcript import Transcript
from serve_app.completions.upstream import Upstream
from serve_app.errors import EngineFailed, RequestError
from serve_app.queueing.line import HeldLease
from serve_app.tracing.context import SpanContext


class Attempt:
    """Holds a lease, asks its replica, and gives the lease back when it is stopped.

    What a stream says goes to `transcript`; None where no texts are kept.
    """

    def __init__(
        self,
        ask: Ask,
        lease: HeldLease,
        session: aiohttp.ClientSession,
        exchange: Exchange,
        spawn: Spawn,
        *,
        transcript: Transcript | None,
    ) -> None:
        self.replica_id = lease.grant.replica_id
        # Whether anything of the answer was handed on.
        self.relayed = False
        self._lease = lease
        # The engine has nothing left to say: another request may follow under the lease.
        self._complete = False
        self._spawn = spawn
        self._stopping: asyncio.Task[None] | None = None
        self._ask = ask
        self._exchange = exchange
        self._upstream = Upstream(session, lease.grant)
        self._answers = ask.kind.answers
        self._reader = (
            self._answers.reader(wants_usage=ask.wants_usage, told=ask.told) if ask.stream else None
        )
        self._transcript = transcript
        self._whole = b""

    async def open(self, span: SpanContext | None) -> None:
        """Ask, and wait for the status of the answer. The replica's spans hang below `span`.

        Raises:
            InvalidRequest: the engine refused the request; carries its words.
            EngineFailed: the replica cannot be reached or failed.
        """
        with self._distrusting():
            await self._upstream.open(self._ask, self._exchange.id.hex, span)

    @property
    def lease_was_gone(self) -> bool:
        """Whether it failed because the lease, kept since an earlier request, led nowhere."""
        return self._lease.rested and self._upstream.shut_out

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield what goes to the client, whole frames only, without what closes the stream.

        Raises:
            InvalidRequest: the engine refused the request in its stream.
            EngineFailed: the stream broke off.
        """
        assert self._reader is not None
        with self._distrusting():
            async for chunk in self._upstream.chunks():
                if data := self._read(self._reader, chunk):
                    self.relayed = True
                    yield data
                if (error := self._reader.error) is not None:
                    raise engine_error(error.status, error.message)
            if not self._reader.done:
                raise EngineFailed
        self._complete = True

    @property
    def closing(self) -> bytes:
        """The bytes that close a stream that came to its proper end."""
        return self._reader.closing if self._reader is not None else b""

    async def whole(self) -> bytes:
        """Return the answer to a request that is not streamed. Raises EngineFailed."""
        with self._distrusting():
            self._whole = await self._upstream.whole()
        self._complete = True
        self._exchange.token_arrived()
        return self._answers.told(self._whole, self._ask.told)

    @contextmanager
    def _distrusting(self) -> Iterator[None]:
        """Close what is kept of this replica where it fails."""
        try:
            yield
        except EngineFailed:
            self._lease.distrust()
            raise

    def error_frame(self, body: dict[str, Any]) -> bytes:
        """Return an OpenAI error object as the last frame of this stream."""
        return self._answers.error_frame(body, self._reader)

    def _read(self, reader: Reader, chunk: bytes) -> bytes:
        data = reader.feed(chunk)
        if data:
            self._exchange.token_arrived()
            if self._transcript is not None:
                self._transcript.add(data)
        return data

    async def stop(self) -> None:
        """End what still runs, so that it tells its usage, and give the lease back; once.

        It goes on where the caller is cancelled, and the next caller waits for its end.
        """
        if self._stopping is None:
            self._stopping = self._spawn(self._stop())
        await asyncio.shield(self._stopping)

    async def _stop(self) -> None:
        try:
            if self._upstream.answering:
                await self._cut_short()
            self._upstream.close()
        except BaseException:
            self._lease.close()
            raise
        self._lease.give_back() if self._complete else self._lease.close()

    async def _cut_short(self) -> None:
        rest = asyncio.create_task(self._read_rest(), name="read-rest")
        if self._answers.ends_early:
            await self._upstream.abort_until(rest)
        else:
            await self._upstream.wait_for(rest)
        await stop_tasks(rest)

    async def _read_rest(self) -> None:
        try:
            if self._reader is None:
                self._whole = await self._upstream.whole()
            else:
                async for chunk in self._upstream.chunks():
                    self._read(self._reader, chunk)
        except RequestError:
            # The engine is gone too: the accounts keep what was seen until here.
            return

    def account(self) -> None:
        """Note in the exchange what the engine said that it did.

        After a failed attempt another may follow, whose answer is the one that counts; the
        tokens of both do.
        """
        exchange = self._exchange
        exchange.leave_attempt()
        if self._reader is not None:
            exchange.usage = self._reader.usage
            exchange.finish_reason = self._reader.finish_reason
            exchange.frames = self._reader.frames
            exchange.transcript = self._transcript
        elif self._whole:
            read = self._answers.read(self._whole)
            exchange.usage, exchange.finish_reason = read.usage, read.finish_reason
            exchange.answer = self._whole
