"""Answers that go out part by part, and that no model makes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import httpx
import pytest
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.completions.parts import Download
from serve_app.errors import StoreUnavailable
from serve_app.identity.principal import Principal
from serve_app.records import Outcome
from serve_app.replica import ReplicaServer
from tests.integration.fakes import AUTHORIZATION, HOST, World, until, world

PARTS = [b"first ", b"second ", b"third"]
SIZE_BYTES = sum(map(len, PARTS))


def _app(of: World, parts: AsyncGenerator[bytes], size_bytes: int) -> ASGIApp:
    async def handler(_principal: Principal, _request: Request) -> Download:
        return Download(parts=parts, size_bytes=size_bytes, media_type="text/plain")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await of.gateway.document("files", handler, Request(scope, receive), send)

    return app


async def _get(app: ASGIApp) -> httpx.Response:
    server = ReplicaServer(app, HOST)
    await server.start()
    try:
        async with httpx.AsyncClient() as http:
            return await http.get(f"http://{server.address}/", headers=AUTHORIZATION)
    finally:
        await server.stop()


async def _three() -> AsyncGenerator[bytes]:
    for part in PARTS:
        yield part


async def _nothing() -> AsyncGenerator[bytes]:
    for part in list[bytes]():
        yield part


async def _broken() -> AsyncGenerator[bytes]:
    yield PARTS[0]
    yield PARTS[1]
    raise StoreUnavailable


async def test_parts_come_out_as_one_answer_with_a_record() -> None:
    async with world() as served:
        response = await _get(_app(served, _three(), SIZE_BYTES))
        assert response.content == b"".join(PARTS)
        assert response.headers["content-type"] == "text/plain"
        assert response.headers["content-length"] == str(SIZE_BYTES)
        assert (served.records[0].status, served.records[0].route) == (200, "files")


async def test_a_download_of_nothing_is_whole() -> None:
    async with world() as served:
        response = await _get(_app(served, _nothing(), 0))
        assert (response.status_code, response.content) == (200, b"")


async def test_a_download_that_breaks_is_not_taken_for_a_whole_one() -> None:
    async with world() as served:
        with pytest.raises(httpx.RemoteProtocolError):
            await _get(_app(served, _broken(), SIZE_BYTES))
        row = served.records[0]
        assert (row.status, row.error_code, row.outcome) == (
            503,
            "store_unavailable",
            Outcome.REFUSED,
        )


async def test_a_client_that_leaves_ends_the_reading() -> None:
    ended = asyncio.Event()

    async def endless() -> AsyncGenerator[bytes]:
        try:
            yield PARTS[0]
            yield PARTS[1]
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with world() as served:
        server = ReplicaServer(_app(served, endless(), SIZE_BYTES), HOST)
        await server.start()
        async with httpx.AsyncClient() as http:
            url = f"http://{server.address}/"
            async with http.stream("GET", url, headers=AUTHORIZATION) as response:
                assert await anext(response.aiter_raw()) == PARTS[0]
        await asyncio.wait_for(ended.wait(), 10)
        await until(lambda: len(served.records) == 1)
        assert served.records[0].outcome is Outcome.CANCELLED
        await server.stop()
