"""Where a request comes from."""

from __future__ import annotations

from starlette.requests import Request


def client_address(request: Request) -> str | None:
    """Return the address of the client, as nginx saw it."""
    # nginx is the only door and sets this header itself.
    return request.headers.get("x-real-ip") or (request.client.host if request.client else None)
