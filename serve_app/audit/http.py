"""The address of the audit log."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from serve_app.audit.reading import AuditFilter, AuditPage, read_page
from serve_app.completions.parts import Document
from serve_app.errors import InvalidRequest
from serve_app.identity.principal import Permission, Principal
from serve_app.listing import AFTER, ORDER, SINCE, UNTIL, Query, limit_docs, page, query_docs
from serve_app.routing import SIGNED_IN, Direct, GetGateway

ROUTE = "admin.audit"

_MOST = 1000
_SOME = 100
_MAX_SEQ = 2**63 - 1
_KNOWN = ("limit", "order", "after", "actor", "action", "since", "until")
_QUERY = query_docs(
    limit_docs(_MOST, _SOME),
    ORDER,
    AFTER,
    ("actor", {"type": "string", "description": "Id of who acted."}),
    ("action", {"type": "string", "description": "What was done, such as `key.create`."}),
    ("since", SINCE),
    ("until", UNTIL),
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
        actor=query.text("actor"),
        action=query.text("action"),
        since=query.time("since"),
        until=query.time("until"),
    )
    where = AuditPage(
        # One more, to know whether there are more.
        limit=query.limit(_MOST, _SOME) + 1,
        after=_row(query),
        newest_first=query.newest_first(),
    )
    return wanted, where


def _row(query: Query) -> int | None:
    value = query.text("after")
    if value is None:
        return None
    good = value.isascii() and value.isdigit() and len(value) <= len(str(_MAX_SEQ))
    if not good or int(value) > _MAX_SEQ:
        raise InvalidRequest("`after` must be the `id` of a row of the audit log.", param="after")
    return int(value)
