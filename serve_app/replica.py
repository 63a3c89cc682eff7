"""The face of a model replica: leases, and the door in front of its HTTP app.

A replica hands out a slot as a lease (through Ray) and serves the request itself over HTTP.
The door lets a request in only with the token of a live lease: one at a time, and the next one
only where the lease may be kept and the one before ended in good order. When the lease ends,
whatever still runs under its token is stopped.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import orjson
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.node_ports import listen
from serve_app.scaling.readings import FirstTokens

LEASE_HEADER = "x-comp-ai-lease"
REQUEST_ID_HEADER = "x-request-id"
ABORT_PATH = "/lease/abort"
END_PATH = "/lease/end"

_TOKEN_BYTES = 32
_GRACE_S = 0.25


# A lease that a gateway keeps takes a slot from the others, so each keeps a small part at most.
_SLOTS_FOR_ONE_KEPT = 16


def may_keep(slots: int) -> int:
    """Return how many leases of a replica with `slots` each gateway may keep between requests."""
    return slots // _SLOTS_FOR_ONE_KEPT


@dataclass(eq=False, slots=True)
class Run:
    """One request that is served under a lease."""

    request_id: str
    # Its last byte went out. The app may still tidy up, and the gateway may be faster.
    answered: bool = False
    task: asyncio.Task[None] | None = None
    stopped: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def in_good_order(self) -> bool:
        """Whether it ended by itself and with a whole answer."""
        if self.task is None or not self.task.done() or self.task.cancelled():
            return False
        return self.answered and not self.stopped.is_set() and self.task.exception() is None

    def stop(self) -> None:
        """End it, if it runs.

        The app first sees its client go: vLLM runs a whole answer in a task of its own, which
        ends on that and would outlive a cancellation. Who does not look is cancelled.
        """
        self.stopped.set()
        if self.task is not None and not self.task.done():
            asyncio.get_running_loop().call_later(_GRACE_S, self.task.cancel)


@dataclass(eq=False, slots=True)
class Slot:
    """One live lease and what runs under it: one request, and the ends of those before."""

    token: str
    # Whether another request may follow one that ended in good order.
    kept: bool = False
    runs: list[Run] = field(default_factory=list)
    used: bool = False
    spent: bool = False
    stopped: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def free(self) -> bool:
        """Whether a request may begin."""
        return not self.spent and all(run.answered for run in self.runs)

    @property
    def resting(self) -> bool:
        """Whether its requests have ended and another may follow."""
        return self.used and not self.spent and not self.runs

    def begin(self, request_id: str) -> Run:
        """Return the run of a request that is let in."""
        self.used, self.spent = True, not self.kept
        run = Run(request_id)
        self.runs.append(run)
        return run

    def end(self, run: Run) -> None:
        """Stop `run` if it still runs; after one that broke off nobody else is let in."""
        self.spent = self.spent or not run.in_good_order
        run.stop()
        self.runs.remove(run)

    def running(self, request_id: str | None) -> Run | None:
        """Return what runs now, if it is that request; None stands for whatever it is."""
        for run in self.runs:
            if not run.answered and request_id in (None, run.request_id):
                return run
        return None

    def stop(self) -> None:
        """End what runs under this lease, and let nobody else in."""
        self.spent = True
        self.stopped.set()
        for run in self.runs:
            run.stop()


class LeaseBook:
    """The live leases of one replica. Used from one event loop only."""

    def __init__(self) -> None:
        self._slots: dict[str, Slot] = {}

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def resting(self) -> int:
        """How many are kept for a next request while none runs under them."""
        return sum(slot.resting for slot in self._slots.values())

    @asynccontextmanager
    async def lease(self, *, kept: bool = False) -> AsyncIterator[Slot]:
        """Hold a slot open; on leaving, also by cancellation, its request is stopped.

        One that is `kept` is good for requests one after the other, else for one.
        """
        slot = Slot(token=secrets.token_urlsafe(_TOKEN_BYTES), kept=kept)
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


Abort = Callable[[Run], Awaitable[None]]


class LeaseDoor:
    """ASGI middleware that lets a request in only under a live lease, one at a time.

    `POST /lease/abort` under the same token asks the engine to end the request early but in
    good order, so that its stream still closes with the usage of what was generated. Its
    X-Request-ID says which one: late, it must not end the next. A gateway of the release
    before says none, and has none but one.

    `POST /lease/end` stops the lease as its end would: who holds it open sees `Slot.stopped`.
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
            await self._end_early(slot, _request_id(headers))
            await _refuse(send, 202, "aborting")
        elif scope["path"] == END_PATH:
            slot.stop()
            await _refuse(send, 202, "ending")
        elif not slot.free:
            await _refuse(send, 409, "this lease is in use, or was used")
        else:
            await self._serve(slot, _request_id(headers) or "", scope, receive, send)

    async def _end_early(self, slot: Slot, request_id: str | None) -> None:
        # What overtakes its request finds nothing to end, and comes again.
        if (run := slot.running(request_id)) is not None:
            await self._abort(run)

    async def _serve(
        self, slot: Slot, request_id: str, scope: Scope, receive: Receive, send: Send
    ) -> None:
        run = slot.begin(request_id)
        # A task of its own, so that the end of the lease stops the engine's request even
        # where the app waits for the next token and would not notice a closed connection.
        noted = _noting_end(_timed(send, self._first_tokens), run)
        run.task = asyncio.create_task(self._run(scope, _stoppable(receive, run), noted))
        try:
            await asyncio.wait([run.task])
        finally:
            slot.end(run)
        if not run.task.cancelled() and (error := run.task.exception()) is not None:
            raise error

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


def _request_id(headers: dict[str, bytes]) -> str | None:
    value = headers.get(REQUEST_ID_HEADER)
    return None if value is None else value.decode("latin-1")


def _stoppable(receive: Receive, run: Run) -> Receive:
    """Return a `receive` that tells of a disconnect when `run` is stopped."""

    async def receive_or_stop() -> Message:
        receiving = asyncio.ensure_future(receive())
        stopping = asyncio.ensure_future(run.stopped.wait())
        try:
            await asyncio.wait([receiving, stopping], return_when=asyncio.FIRST_COMPLETED)
            return receiving.result() if receiving.done() else {"type": "http.disconnect"}
        finally:
            receiving.cancel()
            stopping.cancel()

    return receive_or_stop


def _noting_end(send: Send, run: Run) -> Send:
    """Return a `send` that notes when the last byte goes out."""

    async def send_and_note(message: Message) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            # Before it goes: who reads it may send the next request at once.
            run.answered = True
        await send(message)

    return send_and_note


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


class ReplicaServer:
    """Serves an ASGI app on a free port of `host`, inside the running event loop.

    The port is one of `ports`, or any where there are none.
    """

    def __init__(self, app: ASGIApp, host: str, ports: Sequence[int] = ()) -> None:
        self._host = host
        self._ports = ports
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
        listener = listen(self._host, self._ports)
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
