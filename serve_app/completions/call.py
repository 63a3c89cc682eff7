"""The path of one request.

    admit → authenticate → authorize → claim → recall → reserve → lease → relay
    → settle → record → keep

`Call.complete` is the way there, `Call.finish` the way back, and `Call.end` sends the last
byte once the record is safe.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any, NoReturn

from starlette.requests import Request
from starlette.types import Send

from serve_app.body_shape import shape_of
from serve_app.client_address import client_address
from serve_app.completions.attempt import Attempt
from serve_app.completions.body import Ask, Rules, find_model, govern, model_name, parse_object
from serve_app.completions.elsewhere import open_elsewhere
from serve_app.completions.exchange import Exchange
from serve_app.completions.finishing import Finishing
from serve_app.completions.kept import HEADER, asked_by_body, asked_by_header
from serve_app.completions.keyed import Keyed
from serve_app.completions.kinds import Kind
from serve_app.completions.most import most_tokens
from serve_app.completions.parts import Document, Download, Handler, OnBehalf, Parts, Spawn
from serve_app.completions.reply import Reply
from serve_app.completions.request_body import read_json_body
from serve_app.completions.sse import KEEP_ALIVE, comment
from serve_app.completions.transcript import Transcript
from serve_app.config import Bodies, GatewayConfig, Standing, WhenLogFull
from serve_app.contracts import LeaseHint, Reservation, Spent
from serve_app.errors import (
    AuthenticationFailed,
    ClientGone,
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    LogFull,
    ModelOverloaded,
    RequestError,
    SlowClient,
    to_openai,
)
from serve_app.identity.access import with_access
from serve_app.identity.principal import Permission, Principal
from serve_app.identity.sign_ins import SignIns
from serve_app.limits.headers import ratelimit_headers
from serve_app.limits.scopes import scopes_of
from serve_app.queueing.line import HeldLease
from serve_app.queueing.ticket import Ticket
from serve_app.request_id import fit_request_id
from serve_app.stored.keeping import Keeping
from serve_app.stored.service import Responses
from serve_app.timing import Stage
from serve_app.tracing.context import HEADER as TRACEPARENT

logger = logging.getLogger(__name__)

# A client that sets it to `trailer` gets the timings at the end of a stream, too.
TIMING_HEADER = "x-comp-ai-server-timing"
# Nobody knows when a disk is made free; so often it costs nothing to ask again.
_RETRY_FULL_S = 10.0


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
        *,
        responses: Responses,
        sign_ins: SignIns,
    ) -> None:
        self._config = config
        self._parts = parts
        self._spawn = spawn
        self._responses = responses
        self._sign_ins = sign_ins
        self._keeping: Keeping | None = None
        self._request = request
        self._on_behalf = on_behalf
        self._reply = Reply(send, config.client_write_timeout_s)
        self._keeping_alive: asyncio.Task[None] | None = None
        self._attempts: list[Attempt] = []
        self._asked_elsewhere = False
        self._answer = Document(b"")
        self._body_read = asyncio.Event()
        tracing, traceparent = parts.tracing, request.headers.get(TRACEPARENT)
        self.exchange = Exchange(
            route=route,
            request_id=fit_request_id(request.headers.get("x-request-id")),
            client_address=client_address(request),
            trace=None if tracing is None else tracing.begin(traceparent),
        )
        self._keyed = Keyed(config, parts.database, parts.vault, self.exchange)
        self._finishing = Finishing(config, parts, spawn, self.exchange)

    # The way there.

    async def complete(self, kind: Kind) -> None:
        """Pass every step of a completion, up to but without its last byte."""
        self._admit()
        async with self._deadline():
            principal = await self._authenticate()
            ask = await self._authorize(kind, principal)
            if await self._keyed.claim(self._request.headers, principal):
                return
            if self._keeping is not None and self._keeping.wish.background:
                await self._put_off(principal, self._keeping)
                return
            # Before the reservation: what is continued counts as part of the prompt.
            ask = await self._recall(ask)
            await self._reserve(principal, ask)
            await self._until_answered(principal, ask)

    async def document(self, handler: Handler, permission: Permission | None) -> None:
        """Answer a signed-in caller where no model is needed."""
        self._admit()
        async with self._deadline():
            principal = await self._authenticate()
            if permission is not None:
                principal.require(permission)
            answer = await handler(principal, self._request)
            if isinstance(answer, Download):
                await self._send_parts(answer)
            else:
                self._answer = answer

    async def refuse(self, error: RequestError) -> NoReturn:
        """Fail with `error`, after having seen who asks."""
        self._admit()
        async with self._deadline():
            with suppress(RequestError):
                await self._authenticate()
            raise error

    def _admit(self) -> None:
        """Refuse what could not be recorded. Raises LogFull."""
        with self.exchange.traced(Stage.ADMIT):
            if self._parts.log.full and self._config.when_log_full is WhenLogFull.REFUSE:
                raise LogFull(retry_after_s=_RETRY_FULL_S)

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
        with self.exchange.timings.lap(Stage.AUTHENTICATE):
            principal = with_access(await self._principal(), self._config)
        self.exchange.principal = principal
        return principal

    async def _principal(self) -> Principal:
        if self._on_behalf is not None:
            return self._on_behalf.principal
        headers = self._request.headers.getlist("authorization")
        # Which one counts must not depend on who reads them.
        if len(headers) > 1:
            raise AuthenticationFailed("The Authorization header was sent more than once.")
        return await self._sign_ins.check(
            headers[0] if headers else None,
            self.exchange.client_address,
            self._config.sign_in.failures_per_minute,
        )

    def _standing(self, principal: Principal) -> Standing:
        if self._on_behalf is not None:
            return self._on_behalf.standing
        return self._config.standings.of(principal.roles)

    def _rules(self, principal: Principal) -> Rules:
        return Rules(
            defaults=self._parts.defaults,
            caps=self._config.caps,
            standing=self._standing(principal),
            remote_media=self._config.remote_media,
        )

    async def _authorize(self, kind: Kind, principal: Principal) -> Ask:
        with self.exchange.traced(Stage.AUTHORIZE):
            return await self._govern(kind, principal)

    async def _govern(self, kind: Kind, principal: Principal) -> Ask:
        principal.require(Permission.USER)
        body = await self._read_object(principal)
        name = model_name(body, self._config.default_model)
        model = find_model(self._config, name, principal)
        ask = govern(kind, body, model, self._rules(principal))
        self.exchange.stream = ask.stream
        self.exchange.answers = kind.answers
        if kind is Kind.RESPONSES:
            self._keeping = Keeping(
                self._responses.store,
                self._config,
                response_id=f"resp_{self.exchange.id.hex}",
                bodies=self.exchange.bodies or Bodies.NONE,
                principal_id=principal.id,
                model=model.name,
                body=body,
            )
        return ask

    async def _read_object(self, principal: Principal) -> dict[str, Any]:
        """Return the body, once it is settled what is kept of it: also of one that is refused."""
        exchange = self.exchange
        header = asked_by_header(self._request.headers.getlist(HEADER))
        exchange.bodies = self._kept(principal, header)
        exchange.request_body = await self._read_body()
        body = parse_object(exchange.request_body)
        with suppress(InvalidRequest):
            name = model_name(body, self._config.default_model)
            # Kept under its real name, whatever a client calls it and whether it may use it or not.
            exchange.model = self._config.real_name(name)
        exchange.bodies = self._kept(principal, header, asked_by_body(body))
        if exchange.bodies is Bodies.METADATA:
            exchange.shape = shape_of(body)
        return body

    def _kept(self, principal: Principal, *asked: Bodies | None) -> Bodies:
        if self._on_behalf is not None and self._on_behalf.bodies is not None:
            return self._on_behalf.bodies
        policy = self._config.bodies
        return policy.of(self.exchange.model, principal.roles, principal.bodies, *asked)

    async def _reserve(self, principal: Principal, ask: Ask) -> None:
        exchange, limits = self.exchange, self._config.limits
        most = most_tokens(ask)
        tokens = (most.prompt_tokens, most.completion_tokens)
        reservation = Reservation(
            id=exchange.id,
            scopes=scopes_of(principal, limits),
            most=Spent(tokens=sum(tokens), cost_micros=ask.model.cost_micros(*tokens)),
        )
        # Noted before the call goes out: if it dies in there, what it took is given back.
        exchange.reservation, exchange.priced = reservation, ask.model
        with exchange.timings.lap(Stage.RESERVE):
            allowance = await self._parts.limits.reserve(reservation)
        exchange.allowance = allowance
        if allowance.refusal is not None:
            raise allowance.refusal.error(limits.currency)

    async def _put_off(self, principal: Principal, keeping: Keeping) -> None:
        """Answer at once, and let the response be made in the background."""
        on_behalf = OnBehalf(
            principal=principal, standing=self._standing(principal), bodies=self.exchange.bodies
        )
        request_id = self.exchange.request_id
        self._answer = Document(
            await self._responses.put_off(self._config, keeping, on_behalf, request_id)
        )

    async def _recall(self, ask: Ask) -> Ask:
        return ask if self._keeping is None else await self._keeping.recall(ask)

    async def _until_answered(self, principal: Principal, ask: Ask) -> None:
        """Relay the answer of a replica, of a second one where the first fails before it."""
        attempt = await self._lease(principal, ask)
        while True:
            try:
                return await self._relay(attempt, ask)
            except (EngineFailed, ModelOverloaded) as failure:
                attempt = await self._lease_again(principal, ask, attempt, failure)

    async def _lease(
        self, principal: Principal, ask: Ask, *, avoid: str | None = None, fresh: bool = False
    ) -> Attempt:
        exchange = self.exchange
        ticket = self._ticket(principal, ask, avoid, fresh=fresh)
        if exchange.ticket is None:
            exchange.ticket = ticket
        with exchange.timings.lap(Stage.LEASE):
            exchange.lease = lease = await self._open(ticket)
            exchange.grants.append(lease.grant)
        attempt = Attempt(
            ask,
            lease,
            self._parts.session,
            exchange,
            self._spawn,
            transcript=self._transcript(ask),
        )
        self._attempts.append(attempt)
        return attempt

    def _transcript(self, ask: Ask) -> Transcript | None:
        bodies = self.exchange.bodies
        if bodies is None or not bodies.keeps_texts:
            return None
        return Transcript(ask.kind.answers.pieces, keep_frames=self._keyed.claimed)

    def _ticket(self, principal: Principal, ask: Ask, avoid: str | None, *, fresh: bool) -> Ticket:
        hint = LeaseHint(
            request_id=self.exchange.id.hex,
            principal_id=principal.id,
            standing=ask.standing,
            avoid=avoid,
        )
        return Ticket(
            model=ask.model,
            hint=hint,
            queue=self._config.queue,
            timeout_s=self._config.queue_timeout_s,
            fresh=fresh,
        )

    async def _open(self, ticket: Ticket) -> HeldLease:
        if ticket.hint.avoid is None:
            return await self._parts.models.open(ticket)
        return await open_elsewhere(self._parts.models, ticket)

    async def _lease_again(
        self,
        principal: Principal,
        ask: Ask,
        failed: Attempt,
        failure: EngineFailed | ModelOverloaded,
    ) -> Attempt:
        if not failed.lease_was_gone:
            return await self._lease_elsewhere(principal, ask, failed, failure)
        # No replica has seen the request: this was no attempt, and the next is a first one.
        await failed.stop()
        logger.info("a lease that was kept at replica %s was gone", failed.replica_id)
        return await self._lease(principal, ask, fresh=True)

    async def _lease_elsewhere(
        self,
        principal: Principal,
        ask: Ask,
        failed: Attempt,
        failure: EngineFailed | ModelOverloaded,
    ) -> Attempt:
        """Return a second attempt, the last.

        Raises `failure` where its answer has begun, or where there is no other replica.
        """
        if failed.relayed or self._asked_elsewhere:
            raise failure
        self._asked_elsewhere = True
        if not self._reply.opened:
            # Until the next replica has taken the request, it may still be refused.
            self._stop_comments()
        await failed.stop()
        logger.warning("replica %s failed before its answer, asking another", failed.replica_id)
        self._parts.metrics.request_retried(ask.model.name)
        try:
            return await self._lease(principal, ask, avoid=failed.replica_id, fresh=True)
        except EngineFailed:
            raise failure from None

    async def _relay(self, attempt: Attempt, ask: Ask) -> None:
        with self.exchange.traced(Stage.RELAY) as lap:
            await attempt.open(self.exchange.below(lap))
            await self._pass_all_on(attempt, ask)

    async def _pass_all_on(self, attempt: Attempt, ask: Ask) -> None:
        if not ask.stream:
            self._answer = Document(await attempt.whole())
            return
        self._keep_alive()
        async for data in attempt.stream():
            await self._pass_on(data)
        # Withheld until the request is recorded, as a whole answer is.
        self._answer = Document(attempt.closing)

    async def _pass_on(self, data: bytes) -> None:
        if not self._reply.opened:
            await self._reply.open_stream(self._headers())
        await self._reply.write(data)

    def _keep_alive(self) -> None:
        """Begin to send comments; not before, because they make the status 200."""
        self._stop_comments()
        self._keeping_alive = asyncio.create_task(self._send_comments(), name="keep-alive")

    async def _send_comments(self) -> None:
        with suppress(SlowClient):
            while True:
                await self._reply.silent_for(self._config.keep_alive_s)
                await self._pass_on(KEEP_ALIVE)

    async def _send_parts(self, download: Download) -> None:
        """Send all but the last part, which goes out once the request is recorded."""
        self._body_read.set()
        headers = {"content-type": download.media_type}
        if download.size_bytes is not None:
            headers["content-length"] = str(download.size_bytes)
        # Closed here and now where the client leaves: they may hold a connection to PostgreSQL.
        async with aclosing(download.parts) as parts:
            await self._reply.open(headers | self._headers())
            async for part in parts:
                await self._reply.write(self._answer.body)
                self._answer = Document(part)

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
        self._finishing.note_end(serving)
        if isinstance(self.exchange.error, ClientGone):
            self._stop_comments()
            self._reply.close()
        await self._finishing.run(self._attempts)
        with self._finishing.tried("keep"):
            await self._keep()
        with self._finishing.tried("keep for a retry"):
            await self._keyed.end(self._answer)
        self._stop_comments()
        self._finishing.trace()

    async def _keep(self) -> None:
        if self._keeping is not None and self.exchange.error is None and self._attempts:
            self._answer = Document(await self._keeping.keep(self._answer.body))

    def _stop_comments(self) -> None:
        if self._keeping_alive is not None:
            self._keeping_alive.cancel()
            # Its traceback refers to us: kept, all of a request would wait for the collector.
            self._keeping_alive = None

    async def end(self) -> None:
        """Send what is left to send: the last byte, or the error."""
        if isinstance(self.exchange.error, ClientGone):
            return
        # It is on record; who does not take it now has to ask again.
        with suppress(SlowClient):
            await self._end()

    async def _end(self) -> None:
        error = self.exchange.error
        if self._reply.opened and not self.exchange.stream:
            # Less than the length that was announced, so that a cut download is seen as one.
            await self._reply.end_stream(b"" if error else self._answer.body)
        elif error is not None and self._reply.opened:
            frame = self._attempts[-1].error_frame(to_openai(error))
            await self._reply.end_stream(self._trailer() + frame)
        elif error is not None:
            await self._reply.error(error, self._headers(self.exchange.elapsed_s))
        elif (replay := self._keyed.replay) is not None:
            await self._reply.again(replay, self._headers(self.exchange.elapsed_s))
        elif self.exchange.stream:
            if not self._reply.opened:
                await self._reply.open_stream(self._headers())
            await self._reply.end_stream(self._trailer() + self._answer.body)
        else:
            headers = self._headers(self.exchange.elapsed_s)
            await self._reply.whole(
                self._answer.body, {**headers, **self._answer.headers}, self._answer.media_type
            )

    # Small things.

    async def _read_body(self) -> bytes:
        body = await read_json_body(
            self._request,
            max_bytes=self._config.max_body_bytes,
            timeout_s=self._config.body_timeout_s,
        )
        self._body_read.set()
        return body

    def _trailer(self) -> bytes:
        """Return the timings as a comment of the stream, where the client asked for it."""
        if self._request.headers.get(TIMING_HEADER) != "trailer":
            return b""
        return comment(f"server-timing: {self._timing(self.exchange.elapsed_s)}")

    def _headers(self, total_s: float | None = None) -> dict[str, str]:
        ticket = self.exchange.ticket
        return {
            "server-timing": self._timing(total_s),
            **ratelimit_headers(self.exchange.allowance),
            **(ticket.headers() if ticket is not None else {}),
        }

    def _timing(self, total_s: float | None) -> str:
        return self.exchange.timings.server_timing(total_s)
