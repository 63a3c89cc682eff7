"""Takes the place of a cluster: Serve's deploy API, and the door behind which models answer.

What becomes of a config is told by how long the words of its fake model are, see `FATES`.
"""

from __future__ import annotations

import threading
from copy import deepcopy
from typing import Any

from ray.serve.schema import ServeDeploySchema
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from tests.serve_configs import FAKE_MODEL, suite_config

TOKEN = "token-of-the-cluster-" + "x" * 32
KEY = "key-of-the-smoke-test"
# How long the words of a model are whose replicas …
SERVES, FAILS, HANGS, REFUSED, ANSWERS_500, ANSWERS_400 = range(1, 7)


def config_of(fate: int, *, surge: int = 100) -> dict[str, Any]:
    """Return a config of which this becomes."""
    config = suite_config(real_model=False, gateways=1)
    model = config["applications"][1]
    model["args"]["speed"]["word_chars"] = fate
    model["deployments"][0]["max_surge_percent"] = surge
    return config


class ServeStandIn:
    """Keeps what it is given, as Serve's controller does."""

    def __init__(self) -> None:
        self.puts: list[int] = []
        self.hanging = threading.Event()
        self.applications: list[dict[str, Any]] = []
        self.http_options: dict[str, Any] | None = None
        # What somebody else deploys when the next one looks.
        self.overtaken_by: dict[str, Any] | None = None

    def put(self, config: dict[str, Any]) -> None:
        """Take `config` over, as if somebody had deployed it."""
        schema = ServeDeploySchema.model_validate(config)
        for app in schema.applications:
            app.logging_config = app.logging_config or schema.logging_config
        self.applications = [
            app.model_dump(mode="json", exclude_unset=True) for app in schema.applications
        ]
        if self.http_options is None:
            self.http_options = schema.http_options.model_dump(mode="json")

    @property
    def fate(self) -> int:
        """What becomes of what was given last."""
        if not self.applications:
            return SERVES
        found: int = self.applications[1]["args"]["speed"]["word_chars"]
        return found

    def app(self) -> Starlette:
        """Return the ASGI app: dashboard and door at one address."""
        return Starlette(
            routes=[
                Route("/api/serve/applications/", self._status, methods=["GET"]),
                Route("/api/serve/applications/", self._deploy, methods=["PUT"]),
                Route("/health", lambda _: PlainTextResponse("ok")),
                Route("/v1/models", self._models),
                Route("/v1/completions", self._complete, methods=["POST"]),
            ]
        )

    async def _status(self, request: Request) -> Response:
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return PlainTextResponse("wrong token", 401)
        answer = {"http_options": self.http_options, "applications": self._applications()}
        if self.fate == HANGS:
            self.hanging.set()
        if self.overtaken_by is not None:
            self.put(self.overtaken_by)
            self.overtaken_by = None
        return JSONResponse(answer)

    def _applications(self) -> dict[str, Any]:
        told = {}
        for app in deepcopy(self.applications):
            ill = app["name"] == FAKE_MODEL
            status, message = "RUNNING", ""
            if ill and self.fate == FAILS:
                status, message = "DEPLOY_FAILED", "no such weights"
            elif ill and self.fate == HANGS:
                status = "DEPLOYING"
            healthy = "HEALTHY" if status == "RUNNING" else "UPDATING"
            told[app["name"]] = {
                "status": status,
                "message": message,
                "deployed_app_config": app,
                "deployments": {
                    one["name"]: {"status": healthy, "target_num_replicas": 1}
                    for one in app["deployments"]
                },
            }
        return told

    async def _deploy(self, request: Request) -> Response:
        config = await request.json()
        fate = config["applications"][1]["args"]["speed"]["word_chars"]
        self.puts.append(fate)
        if fate == REFUSED:
            return PlainTextResponse("not valid", 400)
        self.put(config)
        return Response()

    async def _models(self, request: Request) -> Response:
        if request.headers.get("authorization") != f"Bearer {KEY}":
            return JSONResponse({"error": {"message": "wrong key"}}, 401)
        return JSONResponse({"data": [{"id": FAKE_MODEL}]})

    async def _complete(self, request: Request) -> Response:
        if self.fate == ANSWERS_500:
            return JSONResponse({"error": {"message": "engine failed"}}, 502)
        if self.fate == ANSWERS_400:
            return JSONResponse({"error": {"message": "no such parameter"}}, 400)
        return JSONResponse({"choices": []})
