"""The side that is called."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from collections.abc import Mapping, Sequence
from functools import partial

from serve_app.background import stop_tasks
from serve_app.direct.procedures import ANSWERED, FAILED, TOKEN_BYTES, Door, Frame, Handler
from serve_app.log_setup import log_failure
from serve_app.node_ports import listen

logger = logging.getLogger(__name__)

# Who has the token sends it at once.
_TOKEN_TIMEOUT_S = 5.0


class DirectServer:
    """Answers direct calls on a port of `host`: one of `ports`, or any where there are none."""

    def __init__(
        self, handlers: Mapping[int, Handler], host: str, ports: Sequence[int] = ()
    ) -> None:
        self._handlers = handlers
        self._host = host
        self._ports = ports
        self._token = secrets.token_bytes(TOKEN_BYTES)
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self) -> Door:
        """Listen, and return where. Raises OSError if `host` has no such port that is free."""
        listener = listen(self._host, self._ports)
        self._server = await asyncio.start_server(self._connected, sock=listener)
        return Door(host=self._host, port=listener.getsockname()[1], token=self._token)

    async def close(self) -> None:
        """Take no more calls; return once those under way are answered."""
        if self._server is not None:
            self._server.close()
        await stop_tasks(*self._connections)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.create_task(self._serve(reader, writer), name="direct-calls")
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        calls: set[asyncio.Task[bytes]] = set()
        try:
            if await self._let_in(reader):
                while True:
                    call = await Frame.read(reader)
                    work = asyncio.create_task(self._work(call), name="direct-call")
                    calls.add(work)
                    work.add_done_callback(calls.discard)
                    work.add_done_callback(partial(_answer, call, writer))
        except (asyncio.IncompleteReadError, OSError):
            # The caller is gone. What it has called is done all the same.
            return
        finally:
            if calls:
                await asyncio.wait(calls)
            writer.close()

    async def _let_in(self, reader: asyncio.StreamReader) -> bool:
        try:
            async with asyncio.timeout(_TOKEN_TIMEOUT_S):
                return hmac.compare_digest(await reader.readexactly(TOKEN_BYTES), self._token)
        except TimeoutError:
            return False

    async def _work(self, call: Frame) -> bytes:
        return await self._handlers[call.code](call.content)


def _answer(call: Frame, writer: asyncio.StreamWriter, work: asyncio.Task[bytes]) -> None:
    if work.cancelled() or writer.is_closing():
        return  # nobody is left who waits
    if (error := work.exception()) is not None:
        log_failure(logger, "direct call", error)
        writer.write(bytes(Frame(call.number, FAILED, b"")))
    else:
        writer.write(bytes(Frame(call.number, ANSWERED, work.result())))
