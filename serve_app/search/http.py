"""The addresses at which auditors find requests."""

from __future__ import annotations

import uuid
from typing import Annotated, Any

from fastapi import FastAPI, Path
from starlette.requests import Request
from starlette.responses import Response

from serve_app.accounts.bodies import open_bodies
from serve_app.accounts.sealing.subject_keys import SubjectKeys
from serve_app.audit.looks import ONE, SEARCH, note_look
from serve_app.completions.parts import Document, Parts
from serve_app.errors import InvalidRequest, NotFound
from serve_app.identity.principal import Permission, Principal
from serve_app.listing import SINCE, UNTIL, Query, document, limit_docs, page, query_docs
from serve_app.records import Outcome
from serve_app.routing import SIGNED_IN, Direct, GetGateway
from serve_app.search.reading import RequestFilter, read_body, read_request, search
from serve_app.times import parse_time

ROUTE = "admin.requests"

_MOST = 1000
_SOME = 100
_KNOWN = (
    "principal key model outcome status request_id from to limit after".split()  # in this order
)
_UUID = {"type": "string", "format": "uuid"}
_QUERY = query_docs(
    ("principal", {"type": "string", "description": "Id of who asked."}),
    ("key", {**_UUID, "description": "Id of the API key that was used."}),
    ("model", {"type": "string", "description": "Name of the model."}),
    ("outcome", {"type": "string", "enum": [outcome.value for outcome in Outcome]}),
    ("status", {"type": "integer", "minimum": 100, "maximum": 599}),
    ("request_id", {"type": "string", "description": "X-Request-ID of the answer."}),
    ("from", SINCE),
    ("to", UNTIL),
    limit_docs(_MOST, _SOME),
    ("after", {**_UUID, "description": "Id of the request that the page before ended with."}),
)
_BODY = query_docs(
    ("body", {"type": "boolean", "default": False, "description": "With prompt and answer."})
)


def add_search(app: FastAPI, gateway: GetGateway) -> None:
    """Add the addresses."""

    @app.get("/admin/requests", tags=["admin"], openapi_extra=_QUERY, **SIGNED_IN)
    async def find_requests(request: Request) -> Response:
        """Find requests, the newest first, without their texts. For auditors and admins."""

        async def handler(principal: Principal, request: Request) -> Document:
            query = Query(request, known=_KNOWN)
            wanted, limit, after = _filter(query), query.limit(_MOST, _SOME), query.uuid("after")
            parts = gateway().parts
            found = await parts.reports.read(
                # One more, to know whether there are more.
                lambda connection: search(connection, wanted, limit=limit + 1, after=after)
            )
            rows = min(len(found), limit)
            await note_look(parts.database, principal, request, SEARCH, rows=rows)
            return page(found, limit)

        return _for_auditors(gateway, request, handler)

    @app.get("/admin/requests/{id}", tags=["admin"], openapi_extra=_BODY, **SIGNED_IN)
    async def read_one_request(id: Annotated[str, Path()], request: Request) -> Response:
        """Describe one request; with its texts where they are asked for and kept."""

        async def handler(principal: Principal, request: Request) -> Document:
            query = Query(request, known=("body",))
            with_body = query.one_of("body", ("true", "false")) == "true"
            parts = gateway().parts
            found = await _one(parts, id)
            if found is not None and with_body:
                found["body"] = await _body(parts, found)
            rows = 0 if found is None else 1
            await note_look(parts.database, principal, request, ONE, rows=rows, target=id[:100])
            if found is None:
                raise NotFound("There is no request with this id.")
            return document(found)

        return _for_auditors(gateway, request, handler)


def _for_auditors(gateway: GetGateway, request: Request, handler: Any) -> Response:
    return Direct(
        request,
        lambda r, send: gateway().document(ROUTE, handler, r, send, permission=Permission.AUDITOR),
    )


def _filter(query: Query) -> RequestFilter:
    outcome = query.one_of("outcome", [outcome.value for outcome in Outcome])
    wanted = RequestFilter(
        principal=query.text("principal"),
        key=query.uuid("key"),
        model=query.text("model"),
        outcome=None if outcome is None else Outcome(outcome),
        status=query.number("status", 100, 599),
        request_id=query.text("request_id"),
        since=query.time("from"),
        until=query.time("to"),
    )
    if wanted.since and wanted.until and wanted.until <= wanted.since:
        raise InvalidRequest("`to` must be later than `from`.", param="to")
    return wanted


async def _one(parts: Parts, text: str) -> dict[str, Any] | None:
    try:
        request = uuid.UUID(text)
    except ValueError:
        return None
    return await parts.reports.read(lambda connection: read_request(connection, request))


async def _body(parts: Parts, found: dict[str, Any]) -> dict[str, str | None] | None:
    """Return the texts; None: none were kept, or they were erased."""
    # Of the primary: there a key that was destroyed is gone at once.
    async with parts.database.connection() as connection:
        row = await read_body(connection, uuid.UUID(found["id"]), parse_time(found["created_at"]))
        if row is None:
            return None
        (body,) = await open_bodies(connection, SubjectKeys(parts.masters), [row])
    return None if body is None else {"request": body.request, "response": body.response}
