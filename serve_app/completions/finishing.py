"""The way back of a request: what was taken is given back, and the request is recorded.

Each step is tried whatever becomes of the others. Only the record decides over the answer:
where it is not safe, the client does not get the last byte.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from starlette.requests import ClientDisconnect

from serve_app.completions.attempt import Attempt
from serve_app.completions.exchange import Exchange
from serve_app.completions.parts import Parts, Spawn
from serve_app.completions.spans import spans_of
from serve_app.config import Durability, GatewayConfig, WhenLogFull
from serve_app.errors import ClientGone, InternalError, LogFull, LogUnavailable, RequestError
from serve_app.log_setup import log_failure
from serve_app.records import RequestRecord
from serve_app.timing import Stage
from serve_app.tracing.context import SpanContext

logger = logging.getLogger(__name__)

_OTHER_MODEL = "(other)"
_NO_MODEL = "(none)"


class Finishing:
    """Undoes the steps of one request and records it."""

    def __init__(
        self, config: GatewayConfig, parts: Parts, spawn: Spawn, exchange: Exchange
    ) -> None:
        self._config = config
        self._parts = parts
        self._spawn = spawn
        self._exchange = exchange
        self._reported: RequestRecord | None = None

    def note_end(self, serving: asyncio.Task[None]) -> None:
        """Note how `serving`, which is done, came to its end."""
        if serving.cancelled():
            self._exchange.fail(ClientGone())
            return
        error = serving.exception()
        if isinstance(error, ClientDisconnect):
            self._exchange.fail(ClientGone())
        elif isinstance(error, RequestError):
            self._exchange.fail(error)
        elif error is not None:
            log_failure(logger, "request", error)
            self._exchange.fail(InternalError())

    async def run(self, attempts: Sequence[Attempt]) -> None:
        """Stop the engine, settle and record. Never raises."""
        for attempt in attempts:
            with self.tried("stop"):
                await attempt.stop()
            with self.tried("account"):
                attempt.account()
        await asyncio.gather(self._settle(), self._record())

    async def _settle(self) -> None:
        if (reservation := self._exchange.reservation) is not None:
            with self.tried("settle"), self._exchange.traced(Stage.SETTLE):
                await self._parts.limits.settle(reservation, self._exchange.spent())

    async def _record(self) -> None:
        with self._exchange.traced(Stage.RECORD) as lap:
            await self._record_within(self._exchange.below(lap))

    async def _record_within(self, span: SpanContext | None) -> None:
        record: RequestRecord | None = None
        with self.tried("record"):
            record = self._exchange.record(span)
        if record is None:
            self._exchange.fail(InternalError())
            return
        if isinstance(self._exchange.error, LogFull):
            # What room is left is for the requests that were let in.
            self._drop(record)
        elif self._config.durability is Durability.ASYNC:
            self._spawn(self._append_behind(record))
        elif not await self._append(record):
            self._exchange.fail(LogUnavailable())
            record = self._exchange.record(span)
        self._report(record)

    async def _append_behind(self, record: RequestRecord) -> None:
        if not await self._append(record):
            self._drop(record)

    async def _append(self, record: RequestRecord) -> bool:
        """Tell whether the answer may go out: with its record, or without by the policy."""
        with self.tried("append"):
            try:
                async with asyncio.timeout(self._config.record_timeout_s):
                    await self._parts.log.append(record)
            except LogUnavailable:
                return self._goes_on_without(record)
            except (RequestError, TimeoutError):
                logger.error("request %s was not recorded", record.id)
                return False
            return True
        return False

    def _goes_on_without(self, record: RequestRecord) -> bool:
        if self._config.when_log_full is WhenLogFull.DROP:
            self._drop(record)
            return True
        logger.error("request %s was not recorded", record.id)
        return False

    def _drop(self, record: RequestRecord) -> None:
        with self.tried("count"):
            self._parts.metrics.record_dropped(record.outcome)
        logger.error(
            "the record of request %s was dropped",
            record.id,
            extra={"action": "request_log.dropped", "outcome": record.outcome.value},
        )

    def trace(self) -> None:
        """Hand on the spans of the request, if it is traced. Never raises."""
        tracing, record = self._parts.tracing, self._reported
        if tracing is None or record is None or record.traceparent is None:
            return
        with self.tried("trace"):
            tracing.sink.take(spans_of(self._exchange, record, self._model_label()))

    def _report(self, record: RequestRecord) -> None:
        self._reported = record
        label = self._model_label()
        with self.tried("metrics"):
            self._parts.metrics.request_finished(record, label)
        with self.tried("request line"):
            self._parts.lines.write(record, label)

    def _model_label(self) -> str:
        name = self._exchange.model
        if name is None:
            return _NO_MODEL
        return name if self._config.model(name) is not None else _OTHER_MODEL

    def tried(self, step: str) -> _Tried:
        """Return a block after which the work goes on, whatever fails inside."""
        return _Tried(f"{step} of request {self._exchange.id}")


class _Tried:
    """Logs a failure inside its block and lets the work go on after it."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: object
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        log_failure(logger, self._what, error)
        return True
