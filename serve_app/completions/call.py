"""The path of one request.

    authenticate → authorize → reserve → lease → relay → settle → record

`Call.complete` is the way there, `Call.finish` the way back, and `Call.end` sends the last
byte once the record is safe.
"""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import aiohttp
from starlette.requests import ClientDisconnect, Request
from starlette.types import Send

from serve_app.completions.body import (
    Ask,
    Defaults,
    Kind,
    find_model,
    govern,
    model_name,
    parse_object,
)
from serve_app.completions.exchange import Exchange
from serve_app.completions.reply import Reply
from serve_app.completions.sse import (
    DONE,
    StreamReader,
    error_frame,
    read_finish_reason,
    read_object,
    read_usage,
)
from serve_app.completions.upstream import Upstream, engine_error
from serve_app.config import Bodies, Durability, GatewayConfig, Standing
from serve_app.contracts import LeaseHint, LimitKeeper, ModelPool, RecordSink
from serve_app.errors import (
    BodyTooLarge,
    ClientGone,
    DeadlineExceeded,
    EngineFailed,
    InternalError,
    LogUnavailable,
    ModelNotReady,
    RequestError,
    to_openai,
)
from serve_app.identity.principal import Authenticator, Permission, Principal
from serve_app.lazy_pool import LazyPool
from serve_app.metrics import GatewayMetrics
from serve_app.records import RequestRecord
from serve_app.request_line import RequestLines

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Document:
    """An answer that no model makes."""

    body: bytes
    media_type: str = "application/json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Download:
    """An answer that no model makes, part by part; the parts have `size_bytes` together."""

    parts: AsyncIterator[bytes]
    size_bytes: int
    media_type: str = "application/octet-stream"


# Answers a signed-in caller; the request is there for its body and its query.
Handler = Callable[[Principal, Request], Awaitable[Document | Download]]

# Starts a task that outlives the call and that the gateway waits for when it closes.
Spawn = Callable[[Coroutine[Any, Any, Any]], asyncio.Task[Any]]

_OTHER_MODEL = "(other)"
_NO_MODEL = "(none)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a gateway is made of; the seams are in `serve_app.contracts`."""

    authenticator: Authenticator
    limits: LimitKeeper
    models: ModelPool
    log: RecordSink
    metrics: GatewayMetrics
    lines: RequestLines
    session: aiohttp.ClientSession
    # For what is kept between requests; the credentials have a pool of their own.
    database: LazyPool
    defaults: Defaults


@dataclass(frozen=True, slots=True, kw_only=True)
class OnBehalf:
    """Who a request is made for by the gateway itself, and how it stands among others."""

    principal: Principal
    standing: Standing


class Call:
    """One request: its steps, and what undoes them."""

    def __init__(
        self,
        config: GatewayConfig,
        parts: Parts,
        spawn: Spawn,
        route: str,
        request: Request,
        send: Send,
        on_behalf: OnBehalf | None = None,
    ) -> None:
        self._config = config
        self._parts = parts
        self._spawn = spawn
        self._request = request
        self._on_behalf = on_behalf
        self._reply = Reply(send)
        self._upstream: Upstream | None = None
        self._reader: StreamReader | None = None
        self._whole = b""
        self._media_type = "application/json"
        self._body_read = asyncio.Event()
        self.exchange = Exchange(
            route=route,
            request_id=request.headers.get("x-request-id", ""),
            client_address=_client_address(request),
        )

    # The way there.

    async def complete(self, kind: Kind) -> None:
        """Pass every step of a completion, up to but without its last byte."""
        async with self._deadline():
            principal = await self._authenticate()
            ask = await self._authorize(kind, principal)
            await self._reserve(principal)
            upstream = await self._lease(principal, ask)
            await self._relay(upstream, ask)

    async def document(self, handler: Handler) -> None:
        """Answer a signed-in caller where no model is needed."""
        async with self._deadline():
            principal = await self._authenticate()
            principal.require(Permission.USER)
            answer = await handler(principal, self._request)
            if isinstance(answer, Download):
                await self._send_parts(answer)
            else:
                self._whole, self._media_type = answer.body, answer.media_type

    async def refuse(self, error: RequestError) -> NoReturn:
        """Fail with `error`, after having seen who asks."""
        async with self._deadline():
            with suppress(RequestError):
                await self._authenticate()
            raise error

    @asynccontextmanager
    async def _deadline(self) -> AsyncIterator[None]:
        seconds = self._config.deadline_s
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError:
            raise DeadlineExceeded(
                f"The request was not finished within {seconds:g} s. Ask for fewer tokens."
            ) from None

    async def _authenticate(self) -> Principal:
        begun_s = time.perf_counter()
        try:
            principal = await self._principal()
        finally:
            self.exchange.timings.auth_s = time.perf_counter() - begun_s
        self.exchange.principal = principal
        return principal

    async def _principal(self) -> Principal:
        if self._on_behalf is not None:
            return self._on_behalf.principal
        header = self._request.headers.get("authorization")
        return await self._parts.authenticator.authenticate(header)

    def _standing(self, principal: Principal) -> Standing:
        if self._on_behalf is not None:
            return self._on_behalf.standing
        return self._config.standings.of(principal.roles)

    async def _authorize(self, kind: Kind, principal: Principal) -> Ask:
        principal.require(Permission.USER)
        self.exchange.request_body = await self._read_body()
        body = parse_object(self.exchange.request_body)
        self.exchange.model = model_name(body)
        model = find_model(self._config, self.exchange.model, principal)
        ask = govern(kind, body, model, self._parts.defaults)
        self.exchange.stream = ask.stream
        return ask

    async def _reserve(self, principal: Principal) -> None:
        exchange = self.exchange
        policy = self._config.limits.policy_of(principal.id)
        # Noted before the call goes out: if it dies in there, what it took is given back.
        exchange.reserving = True
        begun_s = time.perf_counter()
        try:
            await self._parts.limits.reserve(exchange.id, principal.id, policy)
        finally:
            exchange.timings.limits_s = time.perf_counter() - begun_s

    async def _lease(self, principal: Principal, ask: Ask) -> Upstream:
        exchange = self.exchange
        hint = LeaseHint(
            request_id=exchange.id.hex,
            principal_id=principal.id,
            standing=self._standing(principal),
        )
        begun_s = time.perf_counter()
        try:
            async with asyncio.timeout(self._config.queue_timeout_s):
                exchange.lease = await self._parts.models.open(ask.model, hint)
        except TimeoutError:
            raise ModelNotReady(
                f"No replica of `{ask.model.name}` had room within "
                f"{self._config.queue_timeout_s:g} s. Try again later.",
                retry_after_s=self._config.queue_timeout_s,
            ) from None
        finally:
            exchange.timings.queue_s = time.perf_counter() - begun_s
        self._upstream = Upstream(self._parts.session, exchange.lease.grant)
        return self._upstream

    async def _relay(self, upstream: Upstream, ask: Ask) -> None:
        if ask.stream:
            self._reader = StreamReader(wants_usage=ask.wants_usage)
        await upstream.open(ask, self.exchange.id.hex)
        if self._reader is not None:
            await self._relay_stream(upstream, self._reader)
        else:
            self._whole = await upstream.whole()
            self.exchange.token_arrived()

    async def _relay_stream(self, upstream: Upstream, reader: StreamReader) -> None:
        async for chunk in upstream.chunks():
            if data := self._read(reader, chunk):
                await self._pass_on(data)
            if (error := reader.error) is not None:
                raise engine_error(error.status, error.message)
        if not reader.done:
            raise EngineFailed

    def _read(self, reader: StreamReader, chunk: bytes) -> bytes:
        data = reader.feed(chunk)
        if data:
            self.exchange.token_arrived()
            if self._config.bodies is Bodies.FULL:
                self.exchange.answer += data
        return data

    async def _pass_on(self, data: bytes) -> None:
        if not self._reply.opened:
            await self._reply.open_stream(self._headers())
        await self._reply.write(data)

    async def _send_parts(self, download: Download) -> None:
        """Send all but the last part, which goes out once the request is recorded."""
        self._body_read.set()
        size = str(download.size_bytes)
        headers = {"content-type": download.media_type, "content-length": size}
        await self._reply.open(headers | self._headers())
        async for part in download.parts:
            await self._reply.write(self._whole)
            self._whole = part

    # Watching the client meanwhile.

    async def until_done_or_gone(self, serving: asyncio.Task[None]) -> None:
        """Wait for `serving` to end, or for the client to close the connection."""
        gone = asyncio.create_task(self._until_gone(), name="watch-client")
        try:
            await asyncio.wait([serving, gone], return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()

    async def _until_gone(self) -> None:
        # Until then the body is read from the same place.
        await self._body_read.wait()
        while (await self._request.receive())["type"] != "http.disconnect":
            pass

    # The way back.

    async def finish(self, serving: asyncio.Task[None]) -> None:
        """Undo each step and record the request, once `serving` has ended. Never raises."""
        await asyncio.wait([serving])
        self._note_end(serving)
        await self._stop_engine()
        self._read_accounts()
        await asyncio.gather(self._settle(), self._record())

    async def end(self) -> None:
        """Send what is left to send: the last byte, or the error."""
        error = self.exchange.error
        if isinstance(error, ClientGone):
            return
        if self._reply.opened and not self.exchange.stream:
            # Less than the length that was announced, so that a cut download is seen as one.
            await self._reply.end_stream(b"" if error else self._whole)
        elif error is not None and self._reply.opened:
            await self._reply.end_stream(error_frame(to_openai(error)))
        elif error is not None:
            await self._reply.error(error, self._headers(self.exchange.elapsed_s))
        elif self.exchange.stream:
            if not self._reply.opened:
                await self._reply.open_stream(self._headers())
            await self._reply.end_stream(DONE)
        else:
            headers = self._headers(self.exchange.elapsed_s)
            await self._reply.whole(self._whole, headers, self._media_type)

    def _note_end(self, serving: asyncio.Task[None]) -> None:
        if serving.cancelled():
            self.exchange.fail(ClientGone())
            return
        error = serving.exception()
        if isinstance(error, ClientDisconnect):
            self.exchange.fail(ClientGone())
        elif isinstance(error, RequestError):
            self.exchange.fail(error)
        elif error is not None:
            # Its message could quote a prompt, so only its type and place are logged.
            place = "".join(traceback.format_tb(error.__traceback__))
            logger.error("request failed: %s\n%s", type(error).__name__, place)
            self.exchange.fail(InternalError())

    async def _stop_engine(self) -> None:
        upstream, lease = self._upstream, self.exchange.lease
        if upstream is not None:
            if upstream.answering:
                await self._cut_short(upstream)
            upstream.close()
        if lease is not None:
            lease.close()

    async def _cut_short(self, upstream: Upstream) -> None:
        rest = asyncio.create_task(self._read_rest(upstream), name="read-rest")
        await upstream.abort_until(rest)
        rest.cancel()
        await asyncio.wait([rest])

    async def _read_rest(self, upstream: Upstream) -> None:
        try:
            if self._reader is None:
                self._whole = await upstream.whole()
            else:
                async for chunk in upstream.chunks():
                    self._read(self._reader, chunk)
        except RequestError:
            # The engine is gone too: the accounts keep what was seen until here.
            return

    def _read_accounts(self) -> None:
        exchange = self.exchange
        if self._reader is not None:
            exchange.usage = self._reader.usage
            exchange.finish_reason = self._reader.finish_reason
            exchange.frames = self._reader.frames
        elif self._upstream is not None and self._whole:
            body = read_object(self._whole)
            exchange.usage = read_usage(body)
            exchange.finish_reason = read_finish_reason(body)
            exchange.answer += self._whole

    async def _settle(self) -> None:
        if self.exchange.reserving:
            await self._parts.limits.settle(self.exchange.id)

    async def _record(self) -> None:
        record = self.exchange.record(self._config.bodies)
        if self._config.durability is Durability.ASYNC:
            self._spawn(self._append(record))
        elif not await self._append(record):
            self.exchange.fail(LogUnavailable())
            record = self.exchange.record(self._config.bodies)
        self._parts.metrics.request_finished(record, self._model_label())
        self._parts.lines.write(record, self._model_label())

    async def _append(self, record: RequestRecord) -> bool:
        try:
            async with asyncio.timeout(self._config.record_timeout_s):
                await self._parts.log.append(record)
        except (RequestError, TimeoutError):
            logger.error("request %s was not recorded", record.id)
            return False
        return True

    # Small things.

    async def _read_body(self) -> bytes:
        declared = self._request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > self._config.max_body_bytes:
            raise self._too_large()
        body = bytearray()
        async for part in self._request.stream():
            body += part
            if len(body) > self._config.max_body_bytes:
                raise self._too_large()
        self._body_read.set()
        return bytes(body)

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"The request body is larger than {self._config.max_body_bytes} bytes.")

    def _headers(self, total_s: float | None = None) -> dict[str, str]:
        return {"server-timing": self.exchange.timings.server_timing(total_s)}

    def _model_label(self) -> str:
        name = self.exchange.model
        if name is None:
            return _NO_MODEL
        return name if self._config.model(name) is not None else _OTHER_MODEL


def _client_address(request: Request) -> str | None:
    # nginx is the only door and sets this header itself.
    return request.headers.get("x-real-ip") or (request.client.host if request.client else None)
