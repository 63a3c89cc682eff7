"""Where a request comes from."""

from __future__ import annotations

import ipaddress

from starlette.requests import Request


def client_address(request: Request) -> str | None:
    """Return the address of the client, as nginx saw it.

    nginx is the only door to Serve and sets `X-Real-IP` itself, whatever a client sends. Who
    reaches Serve's proxy another way could name any address here; the proxy listens on 127.0.0.1
    or in the cluster's own network. What is no address counts for nothing.
    """
    told = request.headers.get("x-real-ip", "")
    try:
        return str(ipaddress.ip_address(told))
    except ValueError:
        return request.client.host if request.client else None
