"""Where a span stands in its trace, as the `traceparent` header says it.

See https://www.w3.org/TR/trace-context/. Of its `tracestate` nothing is read or passed on.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, replace

HEADER = "traceparent"
# Version 00 alone, and no zeros, which stand for nothing. nginx's template has the same rule.
_FORM = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")
_SAMPLED = 1


@dataclass(frozen=True, slots=True)
class SpanContext:
    """A span: 32 hex digits of its trace, 16 of its own, and whether it is exported."""

    trace_id: str
    span_id: str
    sampled: bool

    @property
    def traceparent(self) -> str:
        """The header by which others hang their spans below this one."""
        return f"00-{self.trace_id}-{self.span_id}-0{int(self.sampled)}"

    @property
    def made_by_nginx(self) -> bool:
        """Whether nginx made it of its `$request_id`, because the client had sent none.

        nginx has no spans and nothing else to make an id of, so half of the trace's stands there.
        """
        return self.trace_id.startswith(self.span_id)

    def sibling(self) -> SpanContext:
        """Return another span of the same trace."""
        return replace(self, span_id=new_span_id())


def parse(traceparent: str | None) -> SpanContext | None:
    """Return what `traceparent` says, or None where it is not valid."""
    match = _FORM.fullmatch(traceparent or "")
    if match is None:
        return None
    trace_id, span_id, flags = match.groups()
    return SpanContext(trace_id, span_id, bool(int(flags, 16) & _SAMPLED))


def new_trace_id() -> str:
    """Return 32 random hex digits."""
    return secrets.token_hex(16)


def new_span_id() -> str:
    """Return 16 random hex digits."""
    return secrets.token_hex(8)
