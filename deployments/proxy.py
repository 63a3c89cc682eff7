"""What Serve's HTTP proxies run in front of themselves.

Serve calls `middlewares` in every proxy where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH is
`deployments.proxy:middlewares`.
"""

from __future__ import annotations

from starlette.middleware import Middleware

from serve_app.proxy_answers import OpenAIAnswers


def middlewares() -> list[Middleware]:
    """Return the middlewares, the innermost first."""
    return [Middleware(OpenAIAnswers)]
