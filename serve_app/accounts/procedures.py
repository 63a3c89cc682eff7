"""What gateways call directly at the request log."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from serve_app.direct import Handler, Procedure
from serve_app.records import RequestRecord

# Of each record, whether it is on disk.
APPEND_ALL = Procedure(1, list[RequestRecord], list[bool])


def log_handlers(
    append_all: Callable[[list[RequestRecord]], Awaitable[list[bool]]],
) -> dict[int, Handler]:
    """Return what answers direct calls by `append_all`."""
    return {APPEND_ALL.code: APPEND_ALL.served_by(append_all)}
