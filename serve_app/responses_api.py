"""The HTTP face of the stored responses; `POST /v1/responses` itself is a completion."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any

from fastapi import FastAPI, Path
from starlette.requests import Request
from starlette.responses import Response

from serve_app.completions.parts import Document
from serve_app.errors import InvalidRequest, UnsupportedParameter
from serve_app.identity.principal import Principal
from serve_app.routing import SIGNED_IN, Direct, GetGateway
from serve_app.stored.service import Page

_ROUTE = "responses"
_MOST_ITEMS = 100
Id = Annotated[str, Path(description="Id of a response.")]

_PAGING: dict[str, Any] = {
    "parameters": [
        {
            "name": "limit",
            "in": "query",
            "description": "Items on a page.",
            "schema": {"type": "integer", "minimum": 1, "maximum": _MOST_ITEMS, "default": 20},
        },
        {
            "name": "order",
            "in": "query",
            "description": "Oldest first, or newest first.",
            "schema": {"enum": ["asc", "desc"], "default": "desc"},
        },
        {
            "name": "after",
            "in": "query",
            "description": "Id of the item that the page before ended with.",
            "schema": {"type": "string"},
        },
    ]
}


def add_responses(app: FastAPI, gateway: GetGateway) -> None:
    """Add what can be done with a stored response."""

    @app.get("/v1/responses/{response_id}", tags=["responses"], **SIGNED_IN)
    async def retrieve_response(response_id: Id, request: Request) -> Response:
        """Return a stored response, whole; of a background response how far it is."""

        async def handler(principal: Principal, request: Request) -> Document:
            _refuse_others(request, (), flags=("stream",))
            return Document(await gateway().responses.retrieve(response_id, principal.id))

        return _document(gateway, "retrieve", handler, request)

    @app.delete("/v1/responses/{response_id}", tags=["responses"], **SIGNED_IN)
    async def delete_response(response_id: Id, request: Request) -> Response:
        """Remove a stored response; one that is under way ends."""

        async def handler(principal: Principal, request: Request) -> Document:
            _refuse_others(request, ())
            return Document(await gateway().responses.delete(response_id, principal.id))

        return _document(gateway, "delete", handler, request)

    @app.post("/v1/responses/{response_id}/cancel", tags=["responses"], **SIGNED_IN)
    async def cancel_response(response_id: Id, request: Request) -> Response:
        """End a background response. One that has ended is returned as it is."""

        async def handler(principal: Principal, request: Request) -> Document:
            _refuse_others(request, ())
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
            _refuse_others(request, ("limit", "order", "after"))
            page, config = read_page(request.query_params), gateway().config
            return Document(
                await gateway().responses.input_items(config, response_id, principal.id, page)
            )

        return _document(gateway, "input_items", handler, request)


def read_page(query: Mapping[str, str]) -> Page:
    """Return the page that a query asks for. Raises InvalidRequest."""
    limit, order = query.get("limit", "20"), query.get("order", "desc")
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= _MOST_ITEMS):
        raise InvalidRequest(
            f"`limit` must be a whole number from 1 to {_MOST_ITEMS}.", param="limit"
        )
    if order not in ("asc", "desc"):
        raise InvalidRequest("`order` must be `asc` or `desc`.", param="order")
    return Page(limit=int(limit), ascending=order == "asc", after=query.get("after"))


def _document(gateway: GetGateway, step: str, handler: Any, request: Request) -> Response:
    return Direct(
        request,
        lambda r, send: gateway().document(f"{_ROUTE}.{step}", handler, r, send),
    )


def _refuse_others(request: Request, known: Collection[str], flags: Collection[str] = ()) -> None:
    """Refuse what would not be honoured; a flag may be named where it is false."""
    for name, value in request.query_params.items():
        if name in known or (name in flags and value == "false"):
            continue
        raise UnsupportedParameter(
            f"The parameter `{name[:100]}` is not supported here. Leave it out.", param=name[:100]
        )
