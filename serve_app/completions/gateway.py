"""The gateway: answers every request it is given, and accounts for it."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Coroutine
from typing import Any

import orjson
from starlette.requests import Request
from starlette.types import Send

from serve_app.completions.body import find_model
from serve_app.completions.call import Call
from serve_app.completions.collected import Answered, Collected
from serve_app.completions.kinds import Kind
from serve_app.completions.parts import Document, Handler, OnBehalf, Parts
from serve_app.config import GatewayConfig, ModelEntry
from serve_app.errors import RequestError
from serve_app.identity.principal import Permission, Principal
from serve_app.identity.sign_ins import SignIns
from serve_app.stored.responses import ResponseStore
from serve_app.stored.service import Responses

MODELS_ROUTE = "models"


class Gateway:
    """Serves requests. `config` may be replaced meanwhile; each request keeps its own."""

    def __init__(self, config: GatewayConfig, parts: Parts) -> None:
        self.config = config
        self.parts = parts
        self._background: set[asyncio.Task[Any]] = set()
        # Calls made for a request must not end with it: the framework below ties what is
        # called inside a request to that request and cancels it along, which would take the
        # lease away before the engine could close its account. So they run in this context.
        self._context = contextvars.copy_context()
        self._sign_ins = SignIns(parts.authenticator, parts.metrics)
        store = ResponseStore(parts.database, parts.vault)
        self.responses = Responses(store, self._make_response, self._spawn)

    async def complete(self, kind: Kind, request: Request, send: Send) -> None:
        """Answer a completion request."""
        call = self._call(kind.route, request, send)
        await self._answer(call, call.complete(kind))

    async def answer_for(
        self, on_behalf: OnBehalf, kind: Kind, body: bytes, request_id: str
    ) -> Answered:
        """Return the answer to a request that the gateway makes for somebody.

        It passes the same path as one that comes from outside, and leaves its record. If this
        is cancelled the request ends like one whose client is gone.
        """
        collected = Collected(body, request_id)
        call = self._call(kind.route, collected.request, collected.send, on_behalf)
        await self._answer(call, call.complete(kind))
        return collected.answered()

    async def document(
        self,
        route: str,
        handler: Handler,
        request: Request,
        send: Send,
        *,
        permission: Permission | None = Permission.USER,
    ) -> None:
        """Answer a signed-in caller with what `handler` returns; no model is needed.

        Where `permission` is None, whoever is signed in gets an answer.
        """
        call = self._call(route, request, send)
        await self._answer(call, call.document(handler, permission))

    async def list_models(self, request: Request, send: Send) -> None:
        """Answer with the models that the caller may use."""

        async def models(principal: Principal, _request: Request) -> Document:
            usable = [m for m in self.config.models if principal.may_use(m)]
            cards = [_card(name, m) for m in usable for name in (m.name, *m.aliases)]
            return Document(orjson.dumps({"object": "list", "data": cards}))

        await self.document(MODELS_ROUTE, models, request, send)

    async def retrieve_model(self, name: str, request: Request, send: Send) -> None:
        """Answer with one model, if the caller may use it."""

        async def model(principal: Principal, _request: Request) -> Document:
            return Document(orjson.dumps(_card(name, find_model(self.config, name, principal))))

        await self.document(MODELS_ROUTE, model, request, send)

    async def refuse(self, error: RequestError, route: str, request: Request, send: Send) -> None:
        """Answer with `error`; the record names the caller where the credential is good."""
        call = self._call(route, request, send)
        await self._answer(call, call.refuse(error))

    async def close(self) -> None:
        """Wait for what still finishes in the background, then close the connections."""
        self.responses.close()
        while self._background:
            await asyncio.wait(self._background)
        await self.parts.models.close()
        await self.parts.session.close()
        await self.parts.database.close()
        await self.parts.reports.close()

    async def _answer(self, call: Call, serving: Coroutine[Any, Any, None]) -> None:
        """Run `serving` until it ends or the client is gone; finish; send the last byte.

        The finishing runs exactly once, in a task that the cancellation of this one does not
        reach: it stops the engine, gives back lease and reservation, and records.
        """
        task = self._spawn(serving)
        try:
            await call.until_done_or_gone(task)
        finally:
            task.cancel()
            await asyncio.shield(self._spawn(call.finish(task)))
        await call.end()

    def _call(
        self, route: str, request: Request, send: Send, on_behalf: OnBehalf | None = None
    ) -> Call:
        return Call(
            self.config,
            self.parts,
            self._spawn,
            route,
            request,
            send,
            on_behalf,
            responses=self.responses,
            sign_ins=self._sign_ins,
        )

    async def _make_response(self, on_behalf: OnBehalf, body: bytes, request_id: str) -> Answered:
        return await self.answer_for(on_behalf, Kind.RESPONSES, body, request_id)

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        # Kept here, because the event loop itself holds tasks only weakly.
        task = asyncio.create_task(work, context=self._context.copy())
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task


def _card(name: str, model: ModelEntry) -> dict[str, object]:
    """Describe `model` under its name or an alias; `root` is its name, `task` what it is for."""
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "comp-ai",
        "root": model.name,
        "task": model.task,
    }
