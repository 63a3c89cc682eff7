"""With what a deployment signs in: at Ray's dashboard, and at our own door."""

from __future__ import annotations

from pathlib import Path

import httpx

from serve_app.errors import ConfigError
from serve_app.settings import Settings
from serve_app.stack.home import Home

LOCAL = "127.0.0.1"
_HEALTH_TIMEOUT_S = 5.0


def ray_token(settings: Settings, home: Home) -> str:
    """Return the token of the Ray cluster. Raises ConfigError where there is none."""
    if settings.service.ray_token is not None:
        return settings.service.ray_token.get_secret_value()
    try:
        return home.ray_token.read_text(encoding="ascii").strip()
    except OSError:
        allowed = f"the token of the Ray cluster, or a folder that holds it ({home.ray_token})"
        raise ConfigError("COMP_AI_RAY_TOKEN", None, allowed) from None


def smoke_key(settings: Settings, home: Home, key_file: Path | None) -> str:
    """Return the key of the smoke test: named, of the settings, or of the first start.

    Raises:
        ConfigError: there is none.
    """
    if key_file is not None:
        return _read_key(key_file)
    if settings.service.api_key is not None:
        return settings.service.api_key.get_secret_value()
    if home.first_key.exists():
        return _read_key(home.first_key)
    allowed = "the file of an API key for the smoke test; or set COMP_AI_API_KEY"
    raise ConfigError("--key-file", None, allowed)


def _read_key(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        allowed = f"a file that holds a key ({type(error).__name__})"
        raise ConfigError("--key-file", str(file), allowed) from None


async def door_url(settings: Settings, proxy_port: int) -> str:
    """Return where clients ask: nginx of this machine, or, without one, the proxy behind it."""
    service = settings.service
    host = LOCAL if service.http_host in ("0.0.0.0", "::") else service.http_host  # noqa: S104
    nginx = f"http://{host}:{service.http_port}"
    async with httpx.AsyncClient(timeout=_HEALTH_TIMEOUT_S, trust_env=False) as http:
        try:
            answer = await http.get(f"{nginx}/health")
        except httpx.HTTPError:
            return f"http://{LOCAL}:{proxy_port}"
    return nginx if answer.status_code == 200 else f"http://{LOCAL}:{proxy_port}"
