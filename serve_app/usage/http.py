"""The addresses of usage: one's own, and everybody's for auditors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from serve_app.audit.looks import USAGE, note_look
from serve_app.completions.parts import Document, Parts
from serve_app.identity.principal import Permission, Principal
from serve_app.listing import AFTER, ORDER, SINCE, UNTIL, Query, limit_docs, page, query_docs
from serve_app.openapi import headers
from serve_app.routing import SIGNED_IN, Direct, GetGateway
from serve_app.usage.question import By, UsagePage, UsageQuestion, read_groups, usual_start
from serve_app.usage.reading import columns, prepare, read_usage
from serve_app.usage.table import to_csv

ROUTE = "usage"
ADMIN_ROUTE = "admin.usage"

_MOST = 10_000
_SOME = 100
_FORMATS = ("json", "csv")
_KNOWN = ("from", "to", "group_by", "model", "key", "format", "limit", "order", "after")
_CSV = "text/csv"
_MINE = (By.MODEL, By.KEY)


def _docs(*, everybody: bool) -> dict[str, Any]:
    groups = "`principal`, `model`, `key`" if everybody else "`model`, `key`"
    said = f"Some of {groups} and one of `day`, `hour`, `minute`, with commas between them."
    principal = ("principal", {"type": "string", "description": "Of this principal alone."})
    parameters = query_docs(
        ("from", {**SINCE, "description": "First moment, a full minute; 30 days ago by day."}),
        ("to", {**UNTIL, "description": "First moment after the last one; now by default."}),
        ("group_by", {"type": "string", "default": "day", "description": said}),
        *((principal,) if everybody else ()),
        ("model", {"type": "string", "description": "Of this model alone, by its name."}),
        ("key", {"type": "string", "format": "uuid", "description": "Of this API key alone."}),
        ("format", {"type": "string", "enum": list(_FORMATS)}),
        limit_docs(_MOST, _SOME),
        ORDER,
        AFTER,
    )
    answer = {"headers": headers("Link"), "content": {_CSV: {"schema": {"type": "string"}}}}
    return {**parameters, "responses": {"200": answer}}


def add_usage(app: FastAPI, gateway: GetGateway) -> None:
    """Add the addresses."""

    @app.get("/v1/usage", tags=["usage"], openapi_extra=_docs(everybody=False), **SIGNED_IN)
    async def read_my_usage(request: Request) -> Response:
        """Say what you used: requests, tokens and cost, as JSON or CSV."""

        async def handler(principal: Principal, request: Request) -> Document:
            asked = _Asked(request, everybody=False)
            mine = replace(asked.question, principal=principal.id)
            return asked.answer(await _read(gateway().parts, mine, asked.page))

        return Direct(request, lambda r, send: gateway().document(ROUTE, handler, r, send))

    @app.get("/admin/usage", tags=["admin"], openapi_extra=_docs(everybody=True), **SIGNED_IN)
    async def read_usage_of_all(request: Request) -> Response:
        """Say what everybody used. For auditors and admins; each look is in the audit log."""

        async def handler(principal: Principal, request: Request) -> Document:
            asked, parts = _Asked(request, everybody=True), gateway().parts
            found = await _read(parts, asked.question, asked.page)
            rows = min(len(found), asked.limit)
            await note_look(parts.database, principal, request, USAGE, rows=rows)
            return asked.answer(found)

        return Direct(
            request,
            lambda r, send: gateway().document(
                ADMIN_ROUTE, handler, r, send, permission=Permission.AUDITOR
            ),
        )


async def _read(parts: Parts, question: UsageQuestion, where: UsagePage) -> list[dict[str, Any]]:
    asked = prepare(question, where)
    return await parts.reports.read(lambda connection: read_usage(connection, asked))


class _Asked:
    """What a request asks, and the form of its answer.

    Raises:
        InvalidRequest, UnsupportedParameter: it is not asked well.
    """

    def __init__(self, request: Request, *, everybody: bool) -> None:
        query = Query(request, known=(*_KNOWN, "principal") if everybody else _KNOWN)
        self._request = request
        self.question = _question(query, everybody=everybody)
        self.limit = query.limit(_MOST, _SOME)
        self.page = UsagePage(
            # One more, to know whether there are more.
            limit=self.limit + 1,
            after=query.text("after"),
            newest_first=query.newest_first(),
        )
        self._as_csv = _wants_csv(query, request)

    def answer(self, found: list[dict[str, Any]]) -> Document:
        """Return the page of `found`, which may have one row more."""
        rows = found[: self.limit]
        more = self._link(rows[-1]["id"]) if len(found) > self.limit else {}
        if not self._as_csv:
            return replace(page(found, self.limit), headers=more)
        body = to_csv(columns(self.question), rows)
        return Document(body, media_type=f"{_CSV}; charset=utf-8; header=present", headers=more)

    def _link(self, last_id: str) -> dict[str, str]:
        following = self._request.url.include_query_params(after=last_id)
        # Relative, so that it is right below whatever prefix the client asked.
        return {"link": f'<?{following.query}>; rel="next"'}


def _question(query: Query, *, everybody: bool) -> UsageQuestion:
    unit, by = read_groups(query.text("group_by") or "day", most=tuple(By) if everybody else _MINE)
    return UsageQuestion(
        since=query.time("from") or usual_start(unit),
        until=query.time("to"),
        unit=unit,
        by=by,
        principal=query.text("principal") if everybody else None,
        model=query.text("model"),
        key=query.uuid("key"),
    )


def _wants_csv(query: Query, request: Request) -> bool:
    named = query.one_of("format", _FORMATS)
    if named is not None:
        return named == "csv"
    accepted = request.headers.get("accept", "")
    return _CSV in accepted and "application/json" not in accepted
