"""The HTTP conversation with the replica that a lease names."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp

from serve_app.completions.body import Ask
from serve_app.completions.engine_errors import refusal_of
from serve_app.contracts import LeaseGrant
from serve_app.errors import EngineFailed
from serve_app.replica import ABORT_PATH, END_PATH, LEASE_HEADER, REQUEST_ID_HEADER
from serve_app.tracing.context import HEADER as TRACEPARENT
from serve_app.tracing.context import SpanContext

# How long a replica may take to agree to end an answer; the abort is repeated meanwhile, because
# one that overtakes its request finds nothing to end.
STATEMENT_TIMEOUT_S = 0.75
# And to tell its usage then. The engine needs one step for it, but on a busy machine the way here
# may take a while; what is not told is missing in the accounts.
_AGREED_TIMEOUT_S = 3.0
_ABORT_EVERY_S = 0.2
# A replica whose loop stands still for longer is told by the end of Ray's call.
_END_TIMEOUT_S = 1.0
# Answers of the lease door to a request that it does not let in.
_AT_THE_DOOR = frozenset({403, 409})


def new_session() -> aiohttp.ClientSession:
    """Return the connection pool to the replicas. Needs a running event loop."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
        # The request's own deadline covers the whole exchange.
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
        auto_decompress=False,
    )


async def end_lease(session: aiohttp.ClientSession, grant: LeaseGrant) -> bool:
    """Tell the replica that a lease is over; return whether it says that it has ended it.

    A replica of the release before takes it for a request, and says no.
    """
    return await _agreed(session, grant, END_PATH, {}, _END_TIMEOUT_S)


async def _agreed(
    session: aiohttp.ClientSession,
    grant: LeaseGrant,
    path: str,
    headers: dict[str, str],
    timeout_s: float,
) -> bool:
    """Return whether the lease's door agrees to what `path` asks it for, in time."""
    try:
        async with session.post(
            f"http://{grant.address}{path}",
            headers={LEASE_HEADER: grant.token, **headers},
            timeout=aiohttp.ClientTimeout(total=timeout_s),
        ) as response:
            return response.status == 202
    except (aiohttp.ClientError, TimeoutError):
        return False


class Upstream:
    """One request to a replica, from its headers to its last byte."""

    def __init__(self, session: aiohttp.ClientSession, grant: LeaseGrant) -> None:
        self._session = session
        self._grant = grant
        self._request_id = ""
        self._posting: asyncio.Task[aiohttp.ClientResponse] | None = None
        # Nobody listens there, or the door knows no such lease: no engine has seen the request.
        self.shut_out = False

    async def open(self, ask: Ask, request_id: str, span: SpanContext | None) -> None:
        """Send the request and wait for the answer's status.

        With a `span` that is not sampled the replica is told to trace nothing, which an engine
        that is told nothing might do.

        Raises:
            InvalidRequest: the engine refused the request; carries its words.
            ModelOverloaded: the engine takes no more.
            EngineFailed: the replica cannot be reached or failed.
        """
        self._request_id = request_id
        headers = {
            "content-type": "application/json",
            LEASE_HEADER: self._grant.token,
            REQUEST_ID_HEADER: request_id,
        }
        if span is not None:
            headers[TRACEPARENT] = span.traceparent
        self._posting = asyncio.create_task(self._post(ask, headers), name="upstream-post")
        try:
            # Shielded: a whole answer has no status before it is complete, and if the client
            # goes away meanwhile, the answer must still come in to tell its usage.
            response = await asyncio.shield(self._posting)
            if response.status != 200:
                self.shut_out = response.status in _AT_THE_DOOR
                raise refusal_of(response.status, await response.read())
        except aiohttp.ClientError as error:
            self.shut_out = isinstance(error, aiohttp.ClientConnectorError)
            raise EngineFailed from error

    async def _post(self, ask: Ask, headers: dict[str, str]) -> aiohttp.ClientResponse:
        url = f"http://{self._grant.address}{ask.kind}"
        return await self._session.post(url, data=ask.payload, headers=headers)

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the answer's bytes as they come. Raises EngineFailed if they break off."""
        if self._posting is None:
            raise EngineFailed
        try:
            response = await asyncio.shield(self._posting)
            async for chunk in response.content.iter_any():
                yield chunk
        except aiohttp.ClientError as error:
            raise EngineFailed from error

    async def whole(self) -> bytes:
        """Return the whole answer. Raises EngineFailed if it breaks off."""
        return b"".join([chunk async for chunk in self.chunks()])

    async def wait_for(self, ended: asyncio.Future[None]) -> None:
        """Wait until `ended` or out of time, without asking the engine for anything."""
        await asyncio.wait([ended], timeout=STATEMENT_TIMEOUT_S)

    async def abort_until(self, ended: asyncio.Future[None]) -> None:
        """Ask the engine to end early and in good order, until `ended` or out of time."""
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        deadline_s = begun_s + STATEMENT_TIMEOUT_S
        while not ended.done() and loop.time() < deadline_s:
            if not await self._abort(deadline_s - loop.time()):
                return
            deadline_s = begun_s + _AGREED_TIMEOUT_S
            await asyncio.wait([ended], timeout=_ABORT_EVERY_S)

    async def _abort(self, timeout_s: float) -> bool:
        request = {REQUEST_ID_HEADER: self._request_id}
        return await _agreed(self._session, self._grant, ABORT_PATH, request, timeout_s)

    @property
    def answering(self) -> bool:
        """Tell whether the request is out and its answer has not ended."""
        if self._posting is None or self._posting.cancelled():
            return False
        if not self._posting.done():
            return True
        return self._posting.exception() is None and not self._posting.result().content.at_eof()

    def close(self) -> None:
        """Drop the connection if the answer is not complete, else keep it for reuse."""
        if self._posting is None:
            return
        if not self._posting.done():
            self._posting.cancel()
        elif not self._posting.cancelled() and self._posting.exception() is None:
            response = self._posting.result()
            # `release` alone would read on to save the connection.
            response.release() if response.content.at_eof() else response.close()
