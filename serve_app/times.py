"""Times as people write them."""

from __future__ import annotations

from datetime import UTC, datetime


def parse_time(text: str) -> datetime:
    """Return the time in ISO 8601 that `text` is; without a zone it is in UTC.

    Raises:
        ValueError, OverflowError: it is none, or no time that we can reckon with.
    """
    time = datetime.fromisoformat(text)
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
