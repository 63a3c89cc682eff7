"""The HTTP face of API keys: `/v1/keys` for one's own, `/admin/keys` for everybody's.

What is answered to `create` and `rotate` holds the secret, for the only time. It is written
nowhere: the record of such a request keeps no body, and no answer is kept for a retry.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, TypeVar

import orjson
from fastapi import FastAPI, Path
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from serve_app.audit.act import Actor
from serve_app.completions.body import parse_object
from serve_app.completions.parts import Document, Download, Handler
from serve_app.completions.request_body import read_json_body
from serve_app.config import Bodies, LimitPolicy
from serve_app.errors import InvalidRequest, NotFound, UnsupportedParameter
from serve_app.identity.api_keys import (
    MAX_NAME_CHARS,
    MAX_NOTE_CHARS,
    MAX_OWNER_CHARS,
    ApiKey,
    ApiKeyStore,
    Check,
    KeyTerms,
    allow_anything,
)
from serve_app.identity.key_rules import (
    Bounds,
    require_new_keys,
    require_own_keys,
)
from serve_app.identity.principal import Permission, Principal
from serve_app.listing import AFTER, ORDER, Query, document, limit_docs, page, query_docs
from serve_app.records import utc_now
from serve_app.routing import SIGNED_IN, Direct, GetGateway

_MOST_KEYS = 100
_SOME_KEYS = 20
_MAX_BODY_BYTES = 64 * 1024
_MOST_MODELS = 1000
_LAST_SECOND = 253402300799  # of the year 9999
Id = Annotated[str, Path(description="Id of a key.")]

_Models = Annotated[list[str], Field(min_length=1, max_length=_MOST_MODELS)]
_UnixSeconds = Annotated[int, Field(ge=0, le=_LAST_SECOND)]


_PAGING = (AFTER, limit_docs(_MOST_KEYS, _SOME_KEYS), ORDER)
_OWNER = ("owner", {"type": "string", "description": "Only keys of this principal."})
_LIST_OWN = query_docs(*_PAGING)
_LIST_ALL = query_docs(*_PAGING, _OWNER)


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Terms(_Body):
    note: str | None = Field(
        default=None, min_length=1, max_length=MAX_NOTE_CHARS, description="A note for people."
    )
    models: _Models | None = Field(
        default=None, description="Models that it may use; all that you may where not named."
    )
    limits: LimitPolicy | None = Field(
        default=None, description="Limits of its own, beside those of its owner."
    )
    bodies: Bodies | None = Field(
        default=None,
        description="The most that is kept of prompts and answers; the policy may keep less.",
    )
    expires_at: _UnixSeconds | None = Field(default=None, description="Unix seconds.")


class _NewKey(_Terms):
    name: str = Field(min_length=1, max_length=MAX_NAME_CHARS, description="What it is for.")
    permissions: list[Permission] | None = Field(
        default=None, min_length=1, description="`comp-ai:user` where not named."
    )


class _NewKeyOfAnybody(_NewKey):
    owner: str = Field(
        min_length=1,
        max_length=MAX_OWNER_CHARS,
        description="Principal that its requests are accounted to.",
    )


class _Change(_Terms):
    """What is named is changed. Null takes away a note, limits, an expiry, models and bodies."""

    name: str = Field(default="", min_length=1, max_length=MAX_NAME_CHARS)
    permissions: list[Permission] = Field(default=[], min_length=1)


class _Rotation(_Body):
    overlap_s: int = Field(
        ge=0,
        description="How long the secrets until now stay valid; 0 ends them at once.",
    )


_Read = TypeVar("_Read", bound=BaseModel)


def add_keys(app: FastAPI, gateway: GetGateway) -> None:
    """Add the addresses of API keys to `app`."""
    _add(app, _Keys(gateway, everybody=False), "/v1/keys", ["keys"], "own")
    _add(app, _Keys(gateway, everybody=True), "/admin/keys", ["admin"], "any")


def _add(app: FastAPI, keys: _Keys, at: str, tags: list[Any], whose: str) -> None:
    def options(name: str, summary: str, **extra: Any) -> dict[str, Any]:
        return {
            "tags": tags,
            "operation_id": f"{name}_{whose}",
            "summary": summary,
            "openapi_extra": extra,
            **SIGNED_IN,
        }

    of = f"{at}/{{key_id}}"

    @app.post(at, **options("create_key", "Make a key", **_body_docs(keys.new)))
    async def create_key(request: Request) -> Response:
        return keys.answer(request, "create", keys.create)

    @app.get(at, **options("list_keys", "List keys, the newest first", **keys.list_docs))
    async def list_keys(request: Request) -> Response:
        return keys.answer(request, "list", keys.list)

    @app.get(of, **options("retrieve_key", "Describe one key"))
    async def retrieve_key(key_id: Id, request: Request) -> Response:
        return keys.answer(request, "retrieve", keys.retrieve(key_id))

    @app.post(of, **options("update_key", "Change what is named", **_body_docs(_Change)))
    async def update_key(key_id: Id, request: Request) -> Response:
        return keys.answer(request, "update", keys.update(key_id))

    rotation = _body_docs(_Rotation)

    @app.post(f"{of}/rotate", **options("rotate_key", "Give it a new secret", **rotation))
    async def rotate_key(key_id: Id, request: Request) -> Response:
        return keys.answer(request, "rotate", keys.rotate(key_id))

    @app.post(f"{of}/revoke", **options("revoke_key", "Revoke it, for good"))
    async def revoke_key(key_id: Id, request: Request) -> Response:
        return keys.answer(request, "revoke", keys.revoke(key_id))


class _Keys:
    """Handlers of the addresses of keys: of one's own, or of everybody's for administrators."""

    def __init__(self, gateway: GetGateway, *, everybody: bool) -> None:
        self._gateway = gateway
        self._everybody = everybody
        self._route = "admin.keys" if everybody else "keys"
        self.new = _NewKeyOfAnybody if everybody else _NewKey
        self.list_docs = _LIST_ALL if everybody else _LIST_OWN

    def answer(self, request: Request, step: str, handler: Handler) -> Response:
        """Let the gateway answer with what `handler` returns, if the caller may ask."""

        async def permitted(principal: Principal, request: Request) -> Document | Download:
            if self._everybody:
                principal.require(Permission.ADMIN)
            else:
                require_own_keys(principal)
            return await handler(principal, request)

        return Direct(
            request,
            lambda r, send: self._gateway().document(f"{self._route}.{step}", permitted, r, send),
        )

    def _owner(self, principal: Principal) -> str | None:
        """Return whose keys `principal` manages here; None is everybody's."""
        return None if self._everybody else principal.id

    async def _check(self, principal: Principal) -> Check:
        """Return what raises where a key would do more than `principal` may give it."""
        return allow_anything if self._everybody else (await self._bounds(principal)).check

    async def _bounds(self, principal: Principal) -> Bounds:
        own = principal.api_key_id
        models = self._gateway().config.models
        return Bounds.of(principal, None if own is None else await self._store.get(own), models)

    # The handlers.

    async def create(self, principal: Principal, request: Request) -> Document:
        """Make a key."""
        asked = await self._read(request, self.new)
        if isinstance(asked, _NewKeyOfAnybody):
            owner, most, terms = asked.owner, None, KeyTerms(**_terms(asked))
        else:
            owner, most = principal.id, self._gateway().config.keys.max_per_owner
            terms = await self._own_terms(principal, asked)
        by = Actor.of(principal, request)
        made = await self._store.create(
            terms, owner=owner, by=by, most=most, max_life=self._max_life
        )
        return _with_secret(*made)

    async def _own_terms(self, principal: Principal, asked: _NewKey) -> KeyTerms:
        require_new_keys(principal)
        bounds = await self._bounds(principal)
        terms = KeyTerms(**{**bounds.widest(), **_terms(asked)})
        if asked.expires_at is None and self._max_life is not None:
            latest = utc_now() + self._max_life
            terms = replace(terms, expires_at=min(terms.expires_at or latest, latest))
        bounds.check(terms)
        return terms

    async def list(self, principal: Principal, request: Request) -> Document:
        """List keys."""
        query = Query(request, known=[one["name"] for one in self.list_docs["parameters"]])
        limit = query.limit(_MOST_KEYS, _SOME_KEYS)
        after = query.text("after")
        found = await self._store.list(
            query.text("owner") if self._everybody else principal.id,
            after=None if after is None else _after(after),
            limit=limit + 1,
            newest_first=query.newest_first(),
        )
        return page([key.to_openai() for key in found], limit)

    def retrieve(self, key_id: str) -> Handler:
        """Describe one key."""

        async def handler(principal: Principal, request: Request) -> Document:
            Query(request)
            key = await self._store.get(_key_id(key_id), self._owner(principal))
            return document(key.to_openai())

        return handler

    def update(self, key_id: str) -> Handler:
        """Change the terms of a key."""

        async def handler(principal: Principal, request: Request) -> Document:
            changes = _terms(await self._read(request, _Change))
            key = await self._store.change(
                _key_id(key_id),
                changes,
                by=Actor.of(principal, request),
                owner=self._owner(principal),
                check=await self._check(principal),
                max_life=self._max_life,
            )
            return document(key.to_openai())

        return handler

    def rotate(self, key_id: str) -> Handler:
        """Give a key a new secret."""

        async def handler(principal: Principal, request: Request) -> Document:
            overlap_s = (await self._read(request, _Rotation)).overlap_s
            self._check_overlap(overlap_s)
            plain, key = await self._store.rotate(
                _key_id(key_id),
                overlap=timedelta(seconds=overlap_s),
                by=Actor.of(principal, request),
                owner=self._owner(principal),
                check=await self._check(principal),
                max_life=self._max_life,
            )
            return _with_secret(plain, key)

        return handler

    def revoke(self, key_id: str) -> Handler:
        """Revoke a key."""

        async def handler(principal: Principal, request: Request) -> Document:
            Query(request)
            key = await self._store.revoke(
                _key_id(key_id),
                by=Actor.of(principal, request),
                owner=self._owner(principal),
            )
            return document(key.to_openai())

        return handler

    # Small things.

    @property
    def _store(self) -> ApiKeyStore:
        return ApiKeyStore(self._gateway().parts.database)

    @property
    def _max_life(self) -> timedelta | None:
        """How long a secret may live here."""
        max_life_s = None if self._everybody else self._gateway().config.keys.max_life_s
        return None if max_life_s is None else timedelta(seconds=max_life_s)

    def _check_overlap(self, overlap_s: int) -> None:
        most = self._gateway().config.keys.max_overlap_s
        if overlap_s > most:
            message = f"`overlap_s` must be a whole number from 0 to {most}."
            raise InvalidRequest(message, param="overlap_s")

    async def _read(self, request: Request, kind: type[_Read]) -> _Read:
        Query(request)
        timeout_s = self._gateway().config.body_timeout_s
        raw = await read_json_body(request, max_bytes=_MAX_BODY_BYTES, timeout_s=timeout_s)
        return read_body_as(kind, parse_object(raw))


def read_body_as(kind: type[_Read], body: Mapping[str, Any]) -> _Read:
    """Return `body` as a `kind`.

    Raises:
        UnsupportedParameter: a field that would not be honoured.
        InvalidRequest: a field that is missing or wrong.
    """
    try:
        return kind.model_validate_json(orjson.dumps(body), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = ".".join(str(part) for part in first["loc"])[:100]
        if first["type"] == "extra_forbidden":
            raise UnsupportedParameter(
                f"The parameter `{param}` is not supported. Leave it out.", param=param
            ) from None
        raise InvalidRequest(f"`{param}`: {first['msg']}.", param=param) from None


def _terms(asked: _Terms) -> dict[str, Any]:
    """Return the terms that a body names, by their names in `KeyTerms`."""
    names = asked.model_fields_set - {"owner"}
    named = {name: getattr(asked, name) for name in names}
    if isinstance(asked, _NewKey):
        # In a new key null is the same as nothing.
        named = {name: value for name, value in named.items() if value is not None}
    for name in ("permissions", "models"):
        if named.get(name) is not None:
            named[name] = frozenset(named[name])
    if named.get("expires_at") is not None:
        named["expires_at"] = datetime.fromtimestamp(named["expires_at"], UTC)
    return named


def _key_id(text: str) -> uuid.UUID:
    try:
        return uuid.UUID(text)
    except ValueError:
        raise NotFound(
            "There is no key of that id among those that you may see.", param="key_id"
        ) from None


def _after(text: str) -> uuid.UUID:
    try:
        return uuid.UUID(text)
    except ValueError:
        raise InvalidRequest("`after` must be the id of a key.", param="after") from None


def _with_secret(plain: str, key: ApiKey) -> Document:
    body = orjson.dumps({**key.to_openai(), "key": plain})
    return Document(body, headers={"cache-control": "no-store"})


def _body_docs(kind: type[_Body]) -> dict[str, Any]:
    """Return what FastAPI is told of a body that it does not parse."""
    schema = kind.model_json_schema()
    definitions = schema.pop("$defs", {})
    for field in schema["properties"].values():
        # What is left out is left as it is, which no default says.
        field.pop("default", None)
    content = {"application/json": {"schema": _inlined(schema, definitions)}}
    return {"requestBody": {"required": True, "content": content}}


def _inlined(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """Return `schema` with what it refers to in its place."""
    if isinstance(schema, list):
        return [_inlined(one, definitions) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {name: _inlined(value, definitions) for name, value in schema.items()}
