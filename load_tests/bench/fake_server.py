"""The fake engine behind uvicorn alone: what a gateway is compared with, and put in front of."""

from __future__ import annotations

import argparse

import uvicorn
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve_app.fake_engine import FakeEngine, FakeEngineConfig


async def _health(_: Request) -> Response:
    return Response()


def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--time-to-first-token-s", type=float, required=True)
    parser.add_argument("--time-per-token-s", type=float, required=True)
    given = vars(parser.parse_args())
    port = given.pop("port")
    app = FakeEngine(FakeEngineConfig(**given)).app()
    app.router.routes.append(Route("/health", _health))
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", lifespan="off")


if __name__ == "__main__":
    main()
