"""The face of a model replica: leases, and the door in front of its HTTP app.

A replica hands out a slot as a lease (through Ray) and serves the request itself over HTTP.
The door lets a request in only with the token of a live lease, once. When the lease ends,
whatever still runs under its token is stopped.
"""

from __future__ import annotations

import asyncio
import errno
import hmac
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import orjson
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.scaling.readings import FirstTokens

LEASE_HEADER = "x-comp-ai-lease"
REQUEST_ID_HEADER = "x-request-id"
ABORT_PATH = "/lease/abort"

_TOKEN_BYTES = 32
_GRACE_S = 0.25


@dataclass(slots=True)
class Slot:
    """One live lease and what runs under it."""

    token: str
    task: asyncio.Task[None] | None = None
    request_id: str = ""
    used: bool = False
    stopped: asyncio.Event = field(default_factory=asyncio.Event)

    def stop(self) -> None:
        """End the request that runs under this lease, if one does.

        The app first sees its client go: vLLM runs a whole answer in a task of its own, which
        ends on that and would outlive a cancellation. Who does not look is cancelled.
        """
        self.stopped.set()
        if self.task is not None and not self.task.done():
            asyncio.get_running_loop().call_later(_GRACE_S, self.task.cancel)


class LeaseBook:
    """The live leases of one replica. Used from one event loop only."""

    def __init__(self) -> None:
        self._slots: dict[str, Slot] = {}

    def __len__(self) -> int:
        return len(self._slots)

    @asynccontextmanager
    async def lease(self) -> AsyncIterator[Slot]:
        """Hold a slot open; on leaving, also by cancellation, its request is stopped."""
        slot = Slot(token=secrets.token_urlsafe(_TOKEN_BYTES))
        self._slots[slot.token] = slot
        try:
            yield slot
        finally:
            del self._slots[slot.token]
            slot.stop()

    def find(self, token: str) -> Slot | None:
        """Return the live slot that `token` opens, or None."""
        slot = self._slots.get(token)
        # The look-up is by hash; the comparison keeps equality itself free of timing.
        return slot if slot is not None and hmac.compare_digest(slot.token, token) else None


Abort = Callable[[Slot], Awaitable[None]]


class LeaseDoor:
    """ASGI middleware that lets a request in only under a live lease, once.

    `POST /lease/abort` under the same token asks the engine to end the request early but in
    good order, so that its stream still closes with the usage of what was generated.
    """

    def __init__(
        self, app: ASGIApp, book: LeaseBook, abort: Abort, first_tokens: FirstTokens
    ) -> None:
        self._app = app
        self._book = book
        self._abort = abort
        self._first_tokens = first_tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request; see the class."""
        if scope["type"] != "http":
            return
        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        slot = self._book.find(headers.get(LEASE_HEADER, b"").decode("latin-1"))
        if slot is None:
            await _refuse(send, 403, "no live lease")
        elif scope["path"] == ABORT_PATH:
            await self._abort(slot)
            await _refuse(send, 202, "aborting")
        elif slot.used:
            await _refuse(send, 409, "this lease was used")
        else:
            await self._serve(slot, headers, scope, receive, send)

    async def _serve(
        self, slot: Slot, headers: dict[str, bytes], scope: Scope, receive: Receive, send: Send
    ) -> None:
        slot.used = True
        slot.request_id = headers.get(REQUEST_ID_HEADER, b"").decode("latin-1")
        # A task of its own, so that the end of the lease stops the engine's request even
        # where the app waits for the next token and would not notice a closed connection.
        timed = _timed(send, self._first_tokens)
        slot.task = asyncio.create_task(self._run(scope, _stoppable(receive, slot), timed))
        try:
            await asyncio.wait([slot.task])
        finally:
            slot.stop()
        if not slot.task.cancelled() and (error := slot.task.exception()) is not None:
            raise error

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


def _stoppable(receive: Receive, slot: Slot) -> Receive:
    """Return a `receive` that tells of a disconnect when the lease of `slot` ends."""

    async def receive_or_stop() -> Message:
        receiving = asyncio.ensure_future(receive())
        stopping = asyncio.ensure_future(slot.stopped.wait())
        try:
            await asyncio.wait([receiving, stopping], return_when=asyncio.FIRST_COMPLETED)
            return receiving.result() if receiving.done() else {"type": "http.disconnect"}
        finally:
            receiving.cancel()
            stopping.cancel()

    return receive_or_stop


def _timed(send: Send, first_tokens: FirstTokens) -> Send:
    """Return a `send` that notes the first part of a body, which is the first token's."""
    came_s = time.monotonic()
    noted = False

    async def send_and_note(message: Message) -> None:
        nonlocal noted
        if not noted and message["type"] == "http.response.body":
            noted = True
            streams = message.get("more_body", False)
            first_tokens.note(time.monotonic() - came_s if streams else None)
        await send(message)

    return send_and_note


async def _refuse(send: Send, status: int, message: str) -> None:
    body = orjson.dumps({"error": {"message": message, "type": "lease_error"}})
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class _QuietServer(uvicorn.Server):
    """A server that leaves the process's signals to their owner, which is Ray."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _listen(host: str, ports: Sequence[int]) -> socket.socket:
    # Replicas of this node that start at the same time do not all try the same one first.
    start = os.getpid() % len(ports)
    for port in (*ports[start:], *ports[:start]):
        try:
            return socket.create_server((host, port), backlog=2048)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise OSError(errno.EADDRINUSE, f"no free port from {ports[0]} to {ports[-1]}")


class ReplicaServer:
    """Serves an ASGI app on a free port of `host`, inside the running event loop.

    The port is one of `ports`, or any where there are none.
    """

    def __init__(self, app: ASGIApp, host: str, ports: Sequence[int] = ()) -> None:
        self._host = host
        self._ports = ports or (0,)
        self._server = _QuietServer(
            uvicorn.Config(
                app,
                lifespan="off",
                access_log=False,
                log_config=None,
                # Longer than the gateway keeps an idle connection, so that it closes first.
                timeout_keep_alive=120,
            )
        )
        self._task: asyncio.Task[None] | None = None
        self.address = ""

    async def start(self) -> None:
        """Bind, listen and serve. Raises OSError if `host` cannot be bound, or no port is free."""
        listener = _listen(self._host, self._ports)
        port = listener.getsockname()[1]
        self.address = f"{self._host}:{port}"
        self._task = asyncio.create_task(
            self._server.serve(sockets=[listener]), name="replica-http"
        )

    def check(self) -> None:
        """Raise RuntimeError if the server has stopped."""
        if self._task is None or self._task.done():
            raise RuntimeError("the replica's HTTP server has stopped")

    async def stop(self) -> None:
        """Close the listener and wait for open requests."""
        if self._task is not None:
            self._server.should_exit = True
            await asyncio.wait([self._task])
