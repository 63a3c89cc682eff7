"""The HTTP face of the rights of subjects, for administrators.

An export and an erasure use one connection of the gateway for as long as they take, and end with
the request's deadline. An erasure that is broken off goes on when it is asked for again.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Annotated

import orjson
from fastapi import FastAPI, Path
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from serve_app.accounts.sealing.subject_keys import SubjectKeys
from serve_app.audit.act import Actor
from serve_app.completions.body import parse_object
from serve_app.completions.parts import Document, Download, Handler
from serve_app.completions.request_body import read_json_body
from serve_app.errors import InvalidRequest, StoreUnavailable
from serve_app.identity.principal import Permission, Principal
from serve_app.keys_api import read_body_as
from serve_app.lazy_pool import Connection
from serve_app.listing import Query, document, query_docs
from serve_app.openapi import headers
from serve_app.routing import SIGNED_IN, Direct, GetGateway
from serve_app.subjects.erasing import Eraser
from serve_app.subjects.exporting import MEDIA_TYPE, export, note_export
from serve_app.subjects.holds import MAX_REASON_CHARS, list_holds, release_hold, set_hold
from serve_app.subjects.report import signed_report

ROUTE = "admin.subjects"
_MAX_BODY_BYTES = 64 * 1024
_OF = "/admin/subjects/{subject:path}"
_BOOLEANS = {"true": True, "false": False}
_Id = Annotated[str, Path(description="Id of a principal.", min_length=1)]
_DRY_RUN = query_docs(
    ("dry_run", {"type": "boolean", "default": False, "description": "Only count the rows."})
)
_RELEASED = query_docs(
    ("released", {"type": "boolean", "default": False, "description": "Those that ended, too."})
)
_LINES = {
    "responses": {
        "200": {
            "description": "JSON Lines; the last one has the kind `end`.",
            "headers": headers(),
            "content": {MEDIA_TYPE: {"schema": {"type": "string"}}},
        }
    }
}


class _NewHold(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    reason: str = Field(min_length=1, max_length=MAX_REASON_CHARS, description="Why it must stay.")


_HOLD = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": _NewHold.model_json_schema()}},
    }
}


def add_subjects(app: FastAPI, gateway: GetGateway) -> None:
    """Add the addresses of the rights of subjects to `app`."""
    subjects = _Subjects(gateway)

    @app.post(f"{_OF}/export", tags=["admin"], openapi_extra=_LINES, **SIGNED_IN)
    async def export_subject(subject: _Id, request: Request) -> Response:
        """Export all that is kept of one person, as JSON Lines."""
        return subjects.answer(request, "export", subjects.export(subject))

    @app.post(f"{_OF}/erase", tags=["admin"], openapi_extra=_DRY_RUN, **SIGNED_IN)
    async def erase_subject(subject: _Id, request: Request) -> Response:
        """Erase a person; answer with a signed report. Goes on with one that was broken off."""
        return subjects.answer(request, "erase", subjects.erase(subject))

    @app.post(f"{_OF}/hold", tags=["admin"], openapi_extra=_HOLD, **SIGNED_IN)
    async def hold_subject(subject: _Id, request: Request) -> Response:
        """Put a person under a legal hold: nothing of it is removed or erased."""
        return subjects.answer(request, "hold", subjects.hold(subject))

    @app.post(f"{_OF}/release", tags=["admin"], **SIGNED_IN)
    async def release_subject(subject: _Id, request: Request) -> Response:
        """End the legal hold on a person."""
        return subjects.answer(request, "release", subjects.release(subject))

    @app.get("/admin/holds", tags=["admin"], openapi_extra=_RELEASED, **SIGNED_IN)
    async def list_legal_holds(request: Request) -> Response:
        """List the legal holds in force."""
        return subjects.answer(request, "holds", subjects.holds)


class _Subjects:
    def __init__(self, gateway: GetGateway) -> None:
        self._gateway = gateway

    def answer(self, request: Request, step: str, handler: Handler) -> Response:
        """Let the gateway answer an administrator with what `handler` returns."""
        return Direct(
            request,
            lambda r, send: self._gateway().document(
                f"{ROUTE}.{step}", handler, r, send, permission=Permission.ADMIN
            ),
        )

    def export(self, subject: str) -> Handler:
        """Export a subject."""

        async def handler(principal: Principal, request: Request) -> Download:
            Query(request)
            async with self._connection() as connection:
                await note_export(connection, subject, Actor.of(principal, request))
            return Download(parts=self._lines(subject), size_bytes=None, media_type=MEDIA_TYPE)

        return handler

    def erase(self, subject: str) -> Handler:
        """Erase a subject, or count what there is of it."""

        async def handler(principal: Principal, request: Request) -> Document:
            dry_run = _flag(request, "dry_run")
            masters = self._gateway().parts.masters
            if not masters:
                raise StoreUnavailable("No master key is set, so no erasure could be remembered.")
            async with self._connection() as connection:
                eraser = Eraser(connection, masters)
                if dry_run:
                    return document({"subject": subject, "found": await eraser.count(subject)})
                erased = await eraser.erase(subject, Actor.of(principal, request))
            # With the blanks and line ends of a file: it is kept as it is.
            signed = signed_report(erased, masters)
            return Document(orjson.dumps(signed, option=orjson.OPT_INDENT_2))

        return handler

    def hold(self, subject: str) -> Handler:
        """Put a subject under a legal hold."""

        async def handler(principal: Principal, request: Request) -> Document:
            Query(request)
            timeout_s = self._gateway().config.body_timeout_s
            raw = await read_json_body(request, max_bytes=_MAX_BODY_BYTES, timeout_s=timeout_s)
            reason = read_body_as(_NewHold, parse_object(raw)).reason
            async with self._connection() as connection:
                by = Actor.of(principal, request)
                return document((await set_hold(connection, subject, reason, by)).to_json())

        return handler

    def release(self, subject: str) -> Handler:
        """End the legal hold on a subject."""

        async def handler(principal: Principal, request: Request) -> Document:
            Query(request)
            async with self._connection() as connection:
                hold = await release_hold(connection, subject, Actor.of(principal, request))
            return document(hold.to_json())

        return handler

    async def holds(self, _principal: Principal, request: Request) -> Document:
        """List legal holds."""
        released_too = _flag(request, "released")
        async with self._connection() as connection:
            found = await list_holds(connection, released_too=released_too)
        return document({"object": "list", "data": [hold.to_json() for hold in found]})

    async def _lines(self, subject: str) -> AsyncGenerator[bytes]:
        keys = SubjectKeys(self._gateway().parts.masters)
        async with (
            self._connection() as connection,
            aclosing(export(connection, subject, keys)) as lines,
        ):
            async for line in lines:
                yield line

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        gateway = self._gateway()
        seconds = gateway.config.deadline_s
        async with gateway.parts.database.connection(timeout_s=seconds) as connection:
            yield connection


def _flag(request: Request, name: str) -> bool:
    value = Query(request, known=(name,)).text(name)
    if value is None:
        return False
    if value not in _BOOLEANS:
        raise InvalidRequest(f"`{name}` must be true or false.", param=name)
    return _BOOLEANS[value]
