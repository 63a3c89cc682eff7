"""The part of Keycloak's admin REST API that our script uses, in memory, on a real port."""

from __future__ import annotations

import secrets
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs

import uvicorn
from fastapi import FastAPI, HTTPException, Request

ADMIN = ("admin", "p&ss w=rd")
_TOKEN = "token-of-the-admin"


class FakeKeycloak:
    """A realm `lianel` that is empty but for what Keycloak always makes."""

    def __init__(self) -> None:
        self.clients: dict[str, dict[str, Any]] = {}
        self.roles: dict[str, list[dict[str, Any]]] = {}
        self.mappers: dict[str, list[dict[str, Any]]] = {}
        self.users: dict[str, dict[str, Any]] = {}
        self.passwords: dict[str, str] = {}
        # By the thing that has roles: the roles of each client.
        self.given: dict[str, dict[str, list[dict[str, Any]]]] = {}
        self.writes: list[str] = []
        self.url = ""

    def app(self) -> FastAPI:
        """Return the API."""
        app = FastAPI()
        self._add_sign_in(app)
        self._add_clients(app)
        self._add_parts_of_clients(app)
        self._add_users(app)
        return app

    def client(self, name: str) -> dict[str, Any]:
        """Return the client that is called `name`."""
        return next(one for one in self.clients.values() if one["clientId"] == name)

    def names_given(self, place: str) -> set[str]:
        """Return the names of the roles that `place` has."""
        return {role["name"] for roles in self.given.get(place, {}).values() for role in roles}

    def _add_sign_in(self, app: FastAPI) -> None:
        @app.post("/realms/master/protocol/openid-connect/token")
        async def token(request: Request) -> dict[str, str]:
            form = {
                name: values[0]
                for name, values in parse_qs((await request.body()).decode()).items()
            }
            if (form["username"], form["password"]) != ADMIN:
                raise HTTPException(401)
            return {"access_token": _TOKEN}

        @app.middleware("http")
        async def guard(request: Request, call_next: Any) -> Any:
            if request.url.path.startswith("/admin/"):
                assert request.headers["authorization"] == f"Bearer {_TOKEN}"
                if request.method != "GET":
                    self.writes.append(f"{request.method} {request.url.path}")
            return await call_next(request)

    def _add_clients(self, app: FastAPI) -> None:
        root = "/admin/realms/lianel/clients"

        @app.get(root)
        async def find(clientId: str) -> list[dict[str, Any]]:  # noqa: N803 - Keycloak's name
            return [one for one in self.clients.values() if one["clientId"] == clientId]

        @app.post(root, status_code=201)
        async def make(request: Request) -> None:
            made = await request.json()
            assert "secret" not in made
            key = str(uuid.uuid4())
            self.mappers[key] = [
                {"id": str(uuid.uuid4()), **one} for one in made.pop("protocolMappers", [])
            ]
            # Keycloak adds attributes of its own, and keeps addresses in an order of its own.
            made["attributes"] = {"realm_client": "false", **made.get("attributes", {})}
            self.clients[key] = {"id": key, "secret": secrets.token_urlsafe(24), **made}
            self.roles[key] = []
            if made["serviceAccountsEnabled"]:
                name = f"service-account-{made['clientId']}"
                self.users[name] = {"id": name, "username": name, "enabled": True}

        @app.get(f"{root}/{{key}}")
        async def get(key: str) -> dict[str, Any]:
            return self.clients[key] | {"protocolMappers": self.mappers[key]}

        @app.put(f"{root}/{{key}}", status_code=204)
        async def put(key: str, request: Request) -> None:
            self.clients[key] |= await request.json()

        @app.get(f"{root}/{{key}}/client-secret")
        async def secret(key: str) -> dict[str, str]:
            return {"type": "secret", "value": self.clients[key]["secret"]}

        @app.post(f"{root}/{{key}}/client-secret")
        async def new_secret(key: str) -> dict[str, str]:
            self.clients[key]["secret"] = secrets.token_urlsafe(24)
            return {"type": "secret", "value": self.clients[key]["secret"]}

        @app.get(f"{root}/{{key}}/service-account-user")
        async def service_account(key: str) -> dict[str, Any]:
            return self.users[f"service-account-{self.clients[key]['clientId']}"]

    def _add_parts_of_clients(self, app: FastAPI) -> None:
        root = "/admin/realms/lianel/clients/{key}"

        @app.get(f"{root}/roles")
        async def roles(key: str) -> list[dict[str, Any]]:
            return self.roles[key]

        @app.post(f"{root}/roles", status_code=201)
        async def make_role(key: str, request: Request) -> None:
            made = await request.json()
            if made["name"] in [role["name"] for role in self.roles[key]]:
                raise HTTPException(409)
            self.roles[key].append({"id": str(uuid.uuid4()), **made})

        @app.get(f"{root}/protocol-mappers/models")
        async def mappers(key: str) -> list[dict[str, Any]]:
            return self.mappers[key]

        @app.post(f"{root}/protocol-mappers/models", status_code=201)
        async def make_mapper(key: str, request: Request) -> None:
            self.mappers[key].append({"id": str(uuid.uuid4()), **await request.json()})

        @app.put(f"{root}/protocol-mappers/models/{{mapper}}", status_code=204)
        async def put_mapper(key: str, mapper: str, request: Request) -> None:
            [found] = [one for one in self.mappers[key] if one["id"] == mapper]
            found |= await request.json()

        @app.get(f"{root}/scope-mappings/clients/{{of}}")
        async def scope(key: str, of: str) -> list[dict[str, Any]]:
            return self.given.get(key, {}).get(of, [])

        @app.post(f"{root}/scope-mappings/clients/{{of}}", status_code=204)
        async def add_scope(key: str, of: str, request: Request) -> None:
            self.given.setdefault(key, {}).setdefault(of, []).extend(await request.json())

    def _add_users(self, app: FastAPI) -> None:
        root = "/admin/realms/lianel/users"

        @app.get(root)
        async def find(username: str, exact: bool) -> list[dict[str, Any]]:
            assert exact
            return [one for one in self.users.values() if one["username"] == username]

        @app.post(root, status_code=201)
        async def make(request: Request) -> None:
            made = await request.json()
            self.users[made["username"]] = {"id": made["username"], **made}

        @app.put(f"{root}/{{key}}", status_code=204)
        async def put(key: str, request: Request) -> None:
            self.users[key] |= await request.json()

        @app.put(f"{root}/{{key}}/reset-password", status_code=204)
        async def password(key: str, request: Request) -> None:
            self.passwords[key] = (await request.json())["value"]

        @app.get(f"{root}/{{key}}/role-mappings/clients/{{of}}")
        async def mapped(key: str, of: str) -> list[dict[str, Any]]:
            return self.given.get(key, {}).get(of, [])

        @app.post(f"{root}/{{key}}/role-mappings/clients/{{of}}", status_code=204)
        async def map_roles(key: str, of: str, request: Request) -> None:
            self.given.setdefault(key, {}).setdefault(of, []).extend(await request.json())


@contextmanager
def running_keycloak() -> Iterator[FakeKeycloak]:
    """Serve a fake until the block ends."""
    fake = FakeKeycloak()
    listener = socket.create_server(("127.0.0.1", 0))
    fake.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(fake.app(), log_level="error", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield fake
    finally:
        server.should_exit = True
        thread.join(10)
