"""The HTTP face of the stored responses; `POST /v1/responses` itself is a completion."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI, Path
from starlette.requests import Request
from starlette.responses import Response

from serve_app.completions.parts import Document
from serve_app.identity.principal import Principal
from serve_app.listing import AFTER, ORDER, Query, limit_docs, query_docs
from serve_app.routing import SIGNED_IN, Direct, GetGateway
from serve_app.stored.service import Page

_ROUTE = "responses"
_MOST_ITEMS = 100
_SOME_ITEMS = 20
Id = Annotated[str, Path(description="Id of a response.")]

_PAGING = query_docs(limit_docs(_MOST_ITEMS, _SOME_ITEMS), ORDER, AFTER)


def add_responses(app: FastAPI, gateway: GetGateway) -> None:
    """Add what can be done with a stored response."""

    @app.get("/v1/responses/{response_id}", tags=["responses"], **SIGNED_IN)
    async def retrieve_response(response_id: Id, request: Request) -> Response:
        """Return a stored response, whole; of a background response how far it is."""

        async def handler(principal: Principal, request: Request) -> Document:
            Query(request, flags=("stream",))
            return Document(await gateway().responses.retrieve(response_id, principal.id))

        return _document(gateway, "retrieve", handler, request)

    @app.delete("/v1/responses/{response_id}", tags=["responses"], **SIGNED_IN)
    async def delete_response(response_id: Id, request: Request) -> Response:
        """Remove a stored response; one that is under way ends."""

        async def handler(principal: Principal, request: Request) -> Document:
            Query(request)
            return Document(await gateway().responses.delete(response_id, principal.id))

        return _document(gateway, "delete", handler, request)

    @app.post("/v1/responses/{response_id}/cancel", tags=["responses"], **SIGNED_IN)
    async def cancel_response(response_id: Id, request: Request) -> Response:
        """End a background response. One that has ended is returned as it is."""

        async def handler(principal: Principal, request: Request) -> Document:
            Query(request)
            return Document(await gateway().responses.cancel(response_id, principal.id))

        return _document(gateway, "cancel", handler, request)

    @app.get(
        "/v1/responses/{response_id}/input_items",
        tags=["responses"],
        openapi_extra=_PAGING,
        **SIGNED_IN,
    )
    async def list_input_items(response_id: Id, request: Request) -> Response:
        """List what the model was given for a response, the conversation before it included."""

        async def handler(principal: Principal, request: Request) -> Document:
            page, config = _read_page(request), gateway().config
            return Document(
                await gateway().responses.input_items(config, response_id, principal.id, page)
            )

        return _document(gateway, "input_items", handler, request)


def _read_page(request: Request) -> Page:
    query = Query(request, known=("limit", "order", "after"))
    return Page(
        limit=query.limit(_MOST_ITEMS, _SOME_ITEMS),
        ascending=not query.newest_first(),
        after=query.text("after"),
    )


def _document(gateway: GetGateway, step: str, handler: Any, request: Request) -> Response:
    return Direct(
        request,
        lambda r, send: gateway().document(f"{_ROUTE}.{step}", handler, r, send),
    )
