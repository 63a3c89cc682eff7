"""What a gateway is made of, and the words that its parts share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from starlette.requests import Request

from serve_app.accounts.sealing.master_keys import MasterKeys
from serve_app.completions.body import Defaults
from serve_app.config import Bodies, Standing
from serve_app.contracts import LimitKeeper, RecordSink
from serve_app.identity.principal import Authenticator, Principal
from serve_app.lazy_pool import LazyPool
from serve_app.metrics import GatewayMetrics
from serve_app.queueing.pool import QueuedPool
from serve_app.read_pool import ReadPool
from serve_app.request_line import RequestLines
from serve_app.stored.vault import Vault
from serve_app.tracing.sampling import RequestTrace, Sampling
from serve_app.tracing.spans import SpanSink

# Starts a task that outlives the call and that the gateway waits for when it closes.
Spawn = Callable[[Coroutine[Any, Any, Any]], asyncio.Task[Any]]


@dataclass(frozen=True, slots=True)
class Document:
    """An answer that no model makes."""

    body: bytes
    media_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Download:
    """An answer that no model makes, part by part.

    The parts have `size_bytes` together; None is not known beforehand. They are closed by whoever
    sends them.
    """

    parts: AsyncGenerator[bytes]
    size_bytes: int | None
    media_type: str = "application/octet-stream"


# Answers a signed-in caller; the request is there for its body and its query.
Handler = Callable[[Principal, Request], Awaitable[Document | Download]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracing:
    """Which requests are traced, and where their spans go."""

    sampling: Sampling
    sink: SpanSink

    def begin(self, traceparent: str | None) -> RequestTrace:
        """Return the place in its trace of a request that came with this header."""
        return self.sampling.begin(traceparent)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a gateway is made of; the seams are in `serve_app.contracts`."""

    authenticator: Authenticator
    limits: LimitKeeper
    models: QueuedPool
    log: RecordSink
    metrics: GatewayMetrics
    lines: RequestLines
    session: aiohttp.ClientSession
    # For what is kept between requests; the credentials have a pool of their own.
    database: LazyPool
    # For usage and searches, which may take long.
    reports: ReadPool
    defaults: Defaults
    # What the keys of subjects are wrapped with.
    masters: MasterKeys
    # Seals and opens what callers store, with those keys.
    vault: Vault
    # None while tracing is off.
    tracing: Tracing | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OnBehalf:
    """Who a request is made for by the gateway itself, and how it stands among others.

    `bodies` is what is kept of it where that was settled before; its body does not say it then.
    """

    principal: Principal
    standing: Standing
    bodies: Bodies | None = None
