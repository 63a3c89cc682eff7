"""The address of the audit log."""

from __future__ import annotations

from datetime import datetime

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from serve_app.audit.reading import AuditFilter, AuditPage, parse_time, read_page
from serve_app.completions.parts import Document
from serve_app.errors import InvalidRequest
from serve_app.identity.principal import Permission, Principal
from serve_app.listing import AFTER, ORDER, Query, limit_docs, page, query_docs
from serve_app.routing import SIGNED_IN, Direct, GetGateway

ROUTE = "admin.audit"

_MOST = 1000
_SOME = 100
_MAX_SEQ = 2**63 - 1
_KNOWN = ("limit", "order", "after", "actor", "action", "since", "until")
_TIME = {"type": "string", "format": "date-time"}
_QUERY = query_docs(
    limit_docs(_MOST, _SOME),
    ORDER,
    AFTER,
    ("actor", {"type": "string", "description": "Id of who acted."}),
    ("action", {"type": "string", "description": "What was done, such as `key.create`."}),
    ("since", {**_TIME, "description": "First moment; in UTC where it names no zone."}),
    ("until", {**_TIME, "description": "First moment after the last one that is wanted."}),
)


def add_audit(app: FastAPI, gateway: GetGateway) -> None:
    """Add the address at which auditors read."""

    @app.get("/admin/audit", tags=["admin"], openapi_extra=_QUERY, **SIGNED_IN)
    async def list_audit(request: Request) -> Response:
        """List the audit log: who did what, when and from where. For auditors and admins."""

        async def handler(_principal: Principal, request: Request) -> Document:
            wanted, where = _read_query(request)
            async with gateway().parts.database.connection() as connection:
                found = await read_page(connection, wanted, where)
            return page(found, where.limit - 1)

        return Direct(
            request,
            lambda r, send: gateway().document(
                ROUTE, handler, r, send, permission=Permission.AUDITOR
            ),
        )


def _read_query(request: Request) -> tuple[AuditFilter, AuditPage]:
    query = Query(request, known=_KNOWN)
    wanted = AuditFilter(
        actor=_text(query, "actor"),
        action=_text(query, "action"),
        since=_time(query, "since"),
        until=_time(query, "until"),
    )
    where = AuditPage(
        # One more, to know whether there are more.
        limit=query.limit(_MOST, _SOME) + 1,
        after=_row(query),
        newest_first=query.newest_first(),
    )
    return wanted, where


def _text(query: Query, name: str) -> str | None:
    value = query.text(name)
    if value is not None and "\x00" in value:
        raise InvalidRequest(f"`{name}` holds a character that no text here has.", param=name)
    return value


def _time(query: Query, name: str) -> datetime | None:
    value = query.text(name)
    if value is None:
        return None
    try:
        return parse_time(value)
    except (ValueError, OverflowError):
        message = f"`{name}` must be a time as ISO 8601 writes it, such as 2026-01-31T12:00:00Z."
        raise InvalidRequest(message, param=name) from None


def _row(query: Query) -> int | None:
    value = query.text("after")
    if value is None:
        return None
    good = value.isascii() and value.isdigit() and len(value) <= len(str(_MAX_SEQ))
    if not good or int(value) > _MAX_SEQ:
        raise InvalidRequest("`after` must be the `id` of a row of the audit log.", param="after")
    return int(value)
