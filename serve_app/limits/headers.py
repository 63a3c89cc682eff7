"""The state of the limits of a minute, as OpenAI tells it in headers.

https://platform.openai.com/docs/guides/rate-limits: `x-ratelimit-limit-requests: 60`,
`x-ratelimit-remaining-requests: 59`, `x-ratelimit-reset-requests: 1s` (or `6m0s`, `120ms`).
"""

from __future__ import annotations

import math

from serve_app.contracts import Allowance, Window

_MS = 1000


def ratelimit_headers(allowance: Allowance) -> dict[str, str]:
    """Return the headers; none for what is not limited."""
    return _headers("requests", allowance.requests) | _headers("tokens", allowance.tokens)


def _headers(what: str, window: Window | None) -> dict[str, str]:
    if window is None:
        return {}
    return {
        f"x-ratelimit-limit-{what}": str(window.limit),
        f"x-ratelimit-remaining-{what}": str(window.remaining),
        f"x-ratelimit-reset-{what}": duration_text(window.reset_s),
    }


def duration_text(seconds: float) -> str:
    """Return a duration as Go writes it, rounded up to a millisecond: `0s`, `120ms`, `6m0s`."""
    milliseconds = max(0, math.ceil(round(seconds * _MS, 6)))
    if 0 < milliseconds < _MS:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60 * _MS)
    hours, minutes = divmod(minutes, 60)
    text = f"{rest / _MS:g}s"
    if hours or minutes:
        text = f"{minutes}m{text}"
    return f"{hours}h{text}" if hours else text
