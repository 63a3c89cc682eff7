"""Reading the body of a request: JSON as it stands, bounded in size and in time."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from serve_app.errors import BodyTimeout, BodyTooLarge, UnsupportedMediaType


async def read_json_body(request: Request, *, max_bytes: int, timeout_s: float) -> bytes:
    """Return the body of `request`, which is to hold JSON.

    Raises:
        UnsupportedMediaType: the headers say that it is something else, or compressed.
        BodyTooLarge: it is larger than `max_bytes`.
        BodyTimeout: it was not there within `timeout_s`.
    """
    _require_json(request)
    return await read_body(request, max_bytes=max_bytes, timeout_s=timeout_s)


async def read_body(request: Request, *, max_bytes: int, timeout_s: float) -> bytes:
    """Return the body of `request`, whatever it holds. Raises as `read_json_body` does."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                body += part
                if len(body) > max_bytes:
                    raise _too_large(max_bytes)
    except TimeoutError:
        raise BodyTimeout(f"The request body did not arrive within {timeout_s:g} s.") from None
    return bytes(body)


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request body is larger than {max_bytes} bytes.")


def _require_json(request: Request) -> None:
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise UnsupportedMediaType("Compressed bodies are not taken. Send plain JSON.")
    # Without the header nothing else can be meant. With another one it is what a web page of
    # somebody else's could send in its visitor's name.
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type and media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedMediaType
