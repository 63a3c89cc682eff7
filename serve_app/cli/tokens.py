"""`comp-ai token`: a signed-in token, from whichever issuer is in use."""

from __future__ import annotations

from collections.abc import Sequence

import httpx

from serve_app.errors import ConfigError
from serve_app.identity.local_issuer import mint_token
from serve_app.identity.token_client import fetch_token, find_token_endpoint
from serve_app.settings import Settings
from serve_app.stack.home import Home


async def obtain(
    settings: Settings, subject: str, roles: Sequence[str], expires_in_s: float
) -> str:
    """Return a token: minted with the local issuer's key, or fetched from the one configured.

    Raises:
        ConfigError: no client secret, or `comp-ai up` never ran on this data folder.
        RequestError: the issuer refuses or does not answer.
    """
    issuer = settings.oidc.issuer_url
    if issuer is None:
        return _mint(settings, subject, roles, expires_in_s)
    secret = settings.oidc.client_secret
    if secret is None:
        raise ConfigError("COMP_AI_KEYCLOAK_CLIENT_SECRET", None, f"the secret of {_who(settings)}")
    async with httpx.AsyncClient(timeout=10.0) as http:
        endpoint = await find_token_endpoint(issuer, http, settings.oidc.discovery_address)
        return await fetch_token(endpoint, settings.oidc.client_id, secret.get_secret_value(), http)


def _mint(settings: Settings, subject: str, roles: Sequence[str], expires_in_s: float) -> str:
    folder = Home(settings.service.home_path).issuer
    if not folder.is_dir():
        raise ConfigError("COMP_AI_HOME", str(folder.parent), "a folder on which `comp-ai up` ran")
    return mint_token(
        folder,
        issuer_url=f"http://127.0.0.1:{settings.service.issuer_port}",
        audience=settings.oidc.audience,
        subject=subject,
        roles=roles,
        expires_in_s=expires_in_s,
    )


def _who(settings: Settings) -> str:
    return f"the client {settings.oidc.client_id}"
