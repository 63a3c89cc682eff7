"""A span that has ended, and who takes it."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from serve_app.tracing.context import SpanContext

# Never a prompt, an answer, a credential, or a word that a client chose freely.
Attribute = str | bool | int | float | Sequence[str]


class SpanKind(enum.Enum):
    """What a span is to others, in OpenTelemetry's words."""

    INTERNAL = enum.auto()
    SERVER = enum.auto()
    CLIENT = enum.auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """What took how long, and where it stands. Times are of the wall clock, in ns."""

    name: str
    context: SpanContext
    parent: SpanContext | None
    begun_ns: int
    ended_ns: int
    kind: SpanKind = SpanKind.INTERNAL
    failed: bool = False
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    links: Sequence[SpanContext] = ()


class SpanSink(Protocol):
    """Where spans go."""

    def take(self, spans: Sequence[Span]) -> None:
        """Take all of `spans` or, where there is no room, none. Never waits, never raises."""
        ...

    async def close(self) -> None:
        """Send what is left, for a bounded time."""
        ...


class SpanResult(enum.StrEnum):
    """What became of spans."""

    EXPORTED = "exported"
    # There was no room: the collector is slower than the requests.
    DROPPED = "dropped"
    # The collector is away or refused them.
    FAILED = "failed"


class SpanMetrics(Protocol):
    """Is told what became of spans, from whatever thread."""

    def spans_ended(self, result: SpanResult, spans: int) -> None:
        """Count them."""
        ...
