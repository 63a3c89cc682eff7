"""The HTTP face of the gateway: which address leads to which step."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Any

from fastapi import FastAPI, Path
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.requests import Request
from starlette.responses import Response

from serve_app.audit.http import add_audit
from serve_app.batches.http import add_batches
from serve_app.completions.kinds import Kind
from serve_app.identity.me import add_me
from serve_app.keys_api import add_keys
from serve_app.openapi import DESCRIPTION, completed, completion_docs
from serve_app.refusals import add_refusals
from serve_app.responses_api import add_responses
from serve_app.routing import SIGNED_IN, Direct, GetGateway
from serve_app.search.http import add_search
from serve_app.subjects.http import add_subjects
from serve_app.timing import TotalTiming
from serve_app.usage.http import add_usage

_READY_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that a completion needs: its name, and how to see whether it works."""

    name: str
    works: Callable[[], Awaitable[bool]]


class _App(FastAPI):
    """FastAPI with the document put right where the gateway reads requests itself."""

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document."""
        if self.openapi_schema is None:
            self.openapi_schema = completed(super().openapi())
        return self.openapi_schema


def create_app(gateway: GetGateway, checks: Callable[[], list[Check]]) -> FastAPI:
    """Return the ASGI app. `gateway` and `checks` are asked at each request."""
    app = _App(title="Comp AI", description=DESCRIPTION, docs_url=None, redoc_url=None)
    _add_completions(app, gateway)
    add_responses(app, gateway)
    _add_models(app, gateway)
    add_batches(app, gateway)
    add_keys(app, gateway)
    add_me(app, gateway)
    add_audit(app, gateway)
    add_usage(app, gateway)
    add_search(app, gateway)
    add_subjects(app, gateway)
    _add_health(app, checks)
    _add_docs(app)
    add_refusals(app, gateway)
    app.add_middleware(TotalTiming)
    return app


def _add_completions(app: FastAPI, gateway: GetGateway) -> None:
    for kind in Kind:
        for address in kind.endpoint.addresses:
            complete = _complete(kind, gateway)
            # Serves: nothing of a request is FastAPI's to resolve. The other one is described.
            app.router.add_route(address, complete, methods=["POST"], include_in_schema=False)
            app.add_api_route(
                address,
                complete,
                methods=["POST"],
                tags=["completions"],
                # The other addresses are the same endpoint, so the document names one.
                include_in_schema=address == kind.endpoint.addresses[0],
                **completion_docs(kind),
                **SIGNED_IN,
            )


def _complete(kind: Kind, gateway: GetGateway) -> Callable[[Request], Awaitable[Response]]:
    async def complete(request: Request) -> Response:
        return Direct(request, lambda r, send: gateway().complete(kind, r, send))

    return complete


def _add_models(app: FastAPI, gateway: GetGateway) -> None:
    @app.get("/v1/models", tags=["models"], **SIGNED_IN)
    async def list_models(request: Request) -> Response:
        """List the models that you may use."""
        return Direct(request, gateway().list_models)

    @app.get("/v1/models/{model:path}", tags=["models"], **SIGNED_IN)
    async def retrieve_model(model: Annotated[str, Path()], request: Request) -> Response:
        """Describe one model."""
        return Direct(request, lambda r, send: gateway().retrieve_model(model, r, send))


def _add_health(app: FastAPI, checks: Callable[[], list[Check]]) -> None:
    @app.get("/health", tags=["health"])
    async def health() -> dict[str, str]:
        """Tell that this process answers."""
        return {"status": "ok"}

    @app.get("/ready", tags=["health"], responses={503: {"description": "A part is away."}})
    async def ready() -> JSONResponse:
        """Tell whether a completion can be served now; 503 where it cannot."""
        asked = checks()
        results = await asyncio.gather(*(_works(check) for check in asked))
        parts = {check.name: works for check, works in zip(asked, results, strict=True)}
        return JSONResponse(
            {"ready": all(results), "parts": parts}, status_code=200 if all(results) else 503
        )


async def _works(check: Check) -> bool:
    try:
        async with asyncio.timeout(_READY_TIMEOUT_S):
            # Asked again before it is believed: one lost message is not a part that is away.
            return await check.works() or await check.works()
    except TimeoutError:
        return False


def _add_docs(app: FastAPI) -> None:
    # The page's scripts are served from here: the user's network may have no way out. All
    # addresses are relative, so that the page works below any prefix.
    assets = resources.files("fastapi_offline") / "static"
    app.mount("/docs/assets", StaticFiles(directory=str(assets)), name="docs-assets")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title="Comp AI",
            swagger_js_url="docs/assets/swagger-ui-bundle.js",
            swagger_css_url="docs/assets/swagger-ui.css",
            swagger_favicon_url="docs/assets/favicon.png",
        )
