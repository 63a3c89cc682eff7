"""`GET /v1/me`: who asks, as this service sees it, and what is left to use."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from serve_app.completions.parts import Document, Parts
from serve_app.config import GatewayConfig
from serve_app.contracts import MICROS, LimitState
from serve_app.identity.access import counted_roles
from serve_app.identity.api_keys import ApiKeyStore
from serve_app.identity.principal import Permission, Principal
from serve_app.limits.scopes import scopes_of
from serve_app.listing import Query, document
from serve_app.routing import SIGNED_IN, Direct, GetGateway

ROUTE = "me"


def add_me(app: FastAPI, gateway: GetGateway) -> None:
    """Add the address."""

    @app.get("/v1/me", tags=["identity"], **SIGNED_IN)
    async def me(request: Request) -> Response:
        """Say who you are here, what you may do and use, and what is left of your limits."""

        async def handler(principal: Principal, request: Request) -> Document:
            Query(request)
            return document(await _describe(principal, gateway().config, gateway().parts))

        # Also for those who may do nothing: how else would they learn what is missing?
        return Direct(
            request, lambda r, send: gateway().document(ROUTE, handler, r, send, permission=None)
        )


async def _describe(principal: Principal, config: GatewayConfig, parts: Parts) -> dict[str, Any]:
    is_user = principal.holds(Permission.USER)
    return {
        "object": "me",
        "id": principal.id,
        "kind": principal.kind,
        "client_id": principal.client_id,
        "roles": sorted(counted_roles(principal, config)),
        "groups": sorted(principal.groups),
        "permissions": [permission for permission in Permission if principal.holds(permission)],
        "models": [m.name for m in config.models if is_user and principal.may_use(m)],
        "api_key": await _api_key(principal, parts),
        "bodies": {
            model.name: config.bodies.of(model.name, principal.roles, principal.bodies)
            for model in config.models
            if is_user and principal.may_use(model)
        },
        "limits": await _limits(principal, config, parts),
    }


async def _api_key(principal: Principal, parts: Parts) -> dict[str, Any] | None:
    if principal.api_key_id is None:
        return None
    key = await ApiKeyStore(parts.database).get(principal.api_key_id)
    expires_at = key.terms.expires_at
    return {
        "id": str(key.id),
        "prefix": key.prefix,
        "name": key.terms.name,
        "expires_at": None if expires_at is None else int(expires_at.timestamp()),
    }


async def _limits(
    principal: Principal, config: GatewayConfig, parts: Parts
) -> list[dict[str, Any]]:
    states = await parts.limits.standing(scopes_of(principal, config.limits))
    return [_limit(state, config.limits.currency) for state in states]


def _limit(state: LimitState, currency: str | None) -> dict[str, Any]:
    window, money = state.window, state.limit.counts_money
    return {
        "for": state.scope,
        "limit": state.limit,
        "allowed": window.limit / MICROS if money else window.limit,
        "remaining": window.remaining / MICROS if money else window.remaining,
        "currency": currency if money else None,
        "reset_s": round(window.reset_s, 3),
    }
