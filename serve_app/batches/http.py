"""The addresses of files and batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import FastAPI, Path
from starlette.requests import Request
from starlette.responses import Response

from serve_app.batches.batch import WINDOW
from serve_app.batches.files import BATCH_INPUT, BATCH_OUTPUT, FileStore
from serve_app.batches.store import BatchStore, NewBatch
from serve_app.batches.upload import KEEP_S, check_expiry, receive_upload
from serve_app.completions.body import parse_object
from serve_app.completions.kinds import Kind
from serve_app.completions.parts import Document, Download, Handler
from serve_app.completions.request_body import read_json_body
from serve_app.errors import InvalidRequest, NotFound, UnsupportedParameter
from serve_app.identity.principal import Principal
from serve_app.listing import AFTER, ORDER, Query, document, limit_docs, page, query_docs
from serve_app.routing import SIGNED_IN, Direct, GetGateway

ENDPOINTS = [
    kind.value
    for kind in Kind
    if kind.value in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
]
FILES_ROUTE = "files"
BATCHES_ROUTE = "batches"

_MOST_FILES = 10_000
_MOST_BATCHES = 100
_SOME_BATCHES = 20
_MAX_BODY_BYTES = 64 * 1024
_MAX_PAIRS = 16
_MAX_KEY_CHARS = 64
_MAX_VALUE_CHARS = 512
_FIELDS = frozenset(
    {"completion_window", "endpoint", "input_file_id", "metadata", "output_expires_after"}
)

_UPLOAD = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "const": BATCH_INPUT},
                        "expires_after[anchor]": {"type": "string", "const": "created_at"},
                        "expires_after[seconds]": {
                            "type": "integer",
                            "minimum": KEEP_S[0],
                            "maximum": KEEP_S[-1],
                        },
                    },
                    "additionalProperties": False,
                }
            }
        },
    }
}
_EXPIRY = {
    "type": "object",
    "required": ["anchor", "seconds"],
    "properties": {
        "anchor": {"type": "string", "const": "created_at"},
        "seconds": {"type": "integer", "minimum": KEEP_S[0], "maximum": KEEP_S[-1]},
    },
    "additionalProperties": False,
}
_NEW_BATCH = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["completion_window", "endpoint", "input_file_id"],
                    "properties": {
                        "completion_window": {"type": "string", "const": WINDOW},
                        "endpoint": {"type": "string", "enum": ENDPOINTS},
                        "input_file_id": {"type": "string"},
                        "metadata": {
                            "type": ["object", "null"],
                            "maxProperties": _MAX_PAIRS,
                            "propertyNames": {"minLength": 1, "maxLength": _MAX_KEY_CHARS},
                            "additionalProperties": {
                                "type": "string",
                                "maxLength": _MAX_VALUE_CHARS,
                            },
                        },
                        "output_expires_after": _EXPIRY,
                    },
                    "additionalProperties": False,
                }
            }
        },
    }
}


_LIST_FILES = query_docs(
    AFTER,
    limit_docs(_MOST_FILES, _MOST_FILES),
    ORDER,
    ("purpose", {"type": "string", "examples": [BATCH_INPUT, BATCH_OUTPUT]}),
)
_LIST_BATCHES = query_docs(AFTER, limit_docs(_MOST_BATCHES, _SOME_BATCHES))


def add_batches(app: FastAPI, gateway: GetGateway) -> None:
    """Add the addresses of files and batches to `app`."""
    _add_files(app, _Files(gateway))
    _add_batches(app, _Batches(gateway))


def _add_files(app: FastAPI, files: _Files) -> None:
    @app.post("/v1/files", tags=["files"], openapi_extra=_UPLOAD, **SIGNED_IN)
    async def upload_file(request: Request) -> Response:
        """Upload the input of a batch: one JSON object a line."""
        return files.answer(request, files.upload)

    @app.get("/v1/files", tags=["files"], openapi_extra=_LIST_FILES, **SIGNED_IN)
    async def list_files(request: Request) -> Response:
        """List your files."""
        return files.answer(request, files.list)

    @app.get("/v1/files/{file_id}", tags=["files"], **SIGNED_IN)
    async def retrieve_file(file_id: Annotated[str, Path()], request: Request) -> Response:
        """Describe one file."""
        return files.answer(request, files.retrieve(file_id))

    @app.delete("/v1/files/{file_id}", tags=["files"], **SIGNED_IN)
    async def delete_file(file_id: Annotated[str, Path()], request: Request) -> Response:
        """Delete one file."""
        return files.answer(request, files.delete(file_id))

    @app.get("/v1/files/{file_id}/content", tags=["files"], **SIGNED_IN)
    async def download_file(file_id: Annotated[str, Path()], request: Request) -> Response:
        """Return the content of one file."""
        return files.answer(request, files.content(file_id))


def _add_batches(app: FastAPI, batches: _Batches) -> None:
    @app.post("/v1/batches", tags=["batches"], openapi_extra=_NEW_BATCH, **SIGNED_IN)
    async def create_batch(request: Request) -> Response:
        """Run the requests of a file."""
        return batches.answer(request, batches.create)

    @app.get("/v1/batches", tags=["batches"], openapi_extra=_LIST_BATCHES, **SIGNED_IN)
    async def list_batches(request: Request) -> Response:
        """List your batches, the newest first."""
        return batches.answer(request, batches.list)

    @app.get("/v1/batches/{batch_id}", tags=["batches"], **SIGNED_IN)
    async def retrieve_batch(batch_id: Annotated[str, Path()], request: Request) -> Response:
        """Describe one batch: how far it is, and where its results are."""
        return batches.answer(request, batches.retrieve(batch_id))

    @app.post("/v1/batches/{batch_id}/cancel", tags=["batches"], **SIGNED_IN)
    async def cancel_batch(batch_id: Annotated[str, Path()], request: Request) -> Response:
        """Stop a batch; what is done stays."""
        return batches.answer(request, batches.cancel(batch_id))


class _Files:
    """Handlers of the files' addresses."""

    def __init__(self, gateway: GetGateway) -> None:
        self._gateway = gateway

    def answer(self, request: Request, handler: Handler) -> Response:
        """Let the gateway answer with what `handler` returns."""
        return Direct(
            request, lambda r, send: self._gateway().document(FILES_ROUTE, handler, r, send)
        )

    @property
    def _store(self) -> FileStore:
        parts = self._gateway().parts
        return FileStore(parts.database, parts.vault)

    async def upload(self, principal: Principal, request: Request) -> Document:
        """Keep an upload."""
        config = self._gateway().config.files
        async with receive_upload(request, config.max_bytes) as upload:
            file = await self._store.add(
                principal.id,
                upload.filename,
                upload.size_bytes,
                upload.chunks(),
                config,
                upload.expires_after_s,
            )
        return document(file.to_openai())

    async def list(self, principal: Principal, request: Request) -> Document:
        """List the caller's files."""
        query = Query(request, known=("after", "limit", "order", "purpose"))
        limit = query.limit(_MOST_FILES, _MOST_FILES)
        files = await self._store.list(
            principal.id,
            purpose=query.text("purpose"),
            after=query.text("after"),
            limit=limit + 1,
            newest_first=query.newest_first(),
        )
        return page([file.to_openai() for file in files], limit)

    def retrieve(self, file_id: str) -> Handler:
        """Describe one file."""

        async def handler(principal: Principal, _request: Request) -> Document:
            return document((await self._store.find(principal.id, file_id)).to_openai())

        return handler

    def delete(self, file_id: str) -> Handler:
        """Delete one file."""

        async def handler(principal: Principal, _request: Request) -> Document:
            await self._store.delete(principal.id, file_id)
            return document({"id": file_id, "object": "file", "deleted": True})

        return handler

    def content(self, file_id: str) -> Handler:
        """Send the content of one file."""

        async def handler(principal: Principal, _request: Request) -> Download:
            file = await self._store.find(principal.id, file_id)
            return Download(parts=self._store.read(file), size_bytes=file.bytes)

        return handler


class _Batches:
    """Handlers of the batches' addresses."""

    def __init__(self, gateway: GetGateway) -> None:
        self._gateway = gateway

    def answer(self, request: Request, handler: Handler) -> Response:
        """Let the gateway answer with what `handler` returns."""
        return Direct(
            request, lambda r, send: self._gateway().document(BATCHES_ROUTE, handler, r, send)
        )

    @property
    def _store(self) -> BatchStore:
        parts = self._gateway().parts
        return BatchStore(parts.database, parts.vault)

    async def create(self, principal: Principal, request: Request) -> Document:
        """Keep a new batch."""
        timeout_s = self._gateway().config.body_timeout_s
        raw = await read_json_body(request, max_bytes=_MAX_BODY_BYTES, timeout_s=timeout_s)
        new = read_new_batch(parse_object(raw))
        await self._check_file(principal, new.input_file_id)
        return document(await self._store.add(principal, new, self._gateway().config))

    async def list(self, principal: Principal, request: Request) -> Document:
        """List the caller's batches."""
        query = Query(request, known=("after", "limit"))
        limit = query.limit(_MOST_BATCHES, _SOME_BATCHES)
        batches = await self._store.list(principal.id, after=query.text("after"), limit=limit + 1)
        return page(batches, limit)

    def retrieve(self, batch_id: str) -> Handler:
        """Describe one batch."""

        async def handler(principal: Principal, _request: Request) -> Document:
            return document(await self._store.find(principal.id, batch_id))

        return handler

    def cancel(self, batch_id: str) -> Handler:
        """Stop one batch."""

        async def handler(principal: Principal, _request: Request) -> Document:
            return document(await self._store.cancel(principal.id, batch_id))

        return handler

    async def _check_file(self, principal: Principal, file_id: str) -> None:
        parts = self._gateway().parts
        try:
            file = await FileStore(parts.database, parts.vault).find(principal.id, file_id)
        except NotFound:
            message = "You have no file of that id. Upload one with POST /v1/files."
            raise InvalidRequest(message, param="input_file_id") from None
        if file.purpose != BATCH_INPUT:
            message = f"The purpose of the file must be `{BATCH_INPUT}`."
            raise InvalidRequest(message, param="input_file_id")


def read_new_batch(body: Mapping[str, Any]) -> NewBatch:
    """Return the batch that a body asks for.

    Raises:
        UnsupportedParameter: a field that would not be honoured.
        InvalidRequest: a field that is missing or wrong.
    """
    for name in body.keys() - _FIELDS:
        if body[name] is not None:
            raise UnsupportedParameter(
                f"The parameter `{name[:100]}` is not supported. Leave it out.", param=name[:100]
            )
    if body.get("completion_window") != WINDOW:
        message = f"`completion_window` must be `{WINDOW}`."
        raise InvalidRequest(message, param="completion_window")
    endpoint = body.get("endpoint")
    if not isinstance(endpoint, str) or endpoint not in ENDPOINTS:
        message = f"`endpoint` must be one of {', '.join(ENDPOINTS)}."
        raise InvalidRequest(message, param="endpoint")
    file_id = body.get("input_file_id")
    if not isinstance(file_id, str):
        raise InvalidRequest("`input_file_id` must be the id of a file.", param="input_file_id")
    return NewBatch(
        endpoint=endpoint,
        input_file_id=file_id,
        metadata=_metadata(body.get("metadata")),
        output_expires_after_s=_output_expiry(body.get("output_expires_after")),
    )


def _metadata(value: object) -> dict[str, str] | None:
    if value is None:
        return None
    message = (
        f"`metadata` must be an object of up to {_MAX_PAIRS} pairs: keys of 1 to "
        f"{_MAX_KEY_CHARS} and texts of up to {_MAX_VALUE_CHARS} characters."
    )
    if not isinstance(value, dict) or len(value) > _MAX_PAIRS:
        raise InvalidRequest(message, param="metadata")
    for key, text in value.items():
        good = isinstance(text, str) and len(text) <= _MAX_VALUE_CHARS
        if not good or not 0 < len(key) <= _MAX_KEY_CHARS:
            raise InvalidRequest(message, param="metadata")
    return value


def _output_expiry(value: object) -> int | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        message = "`output_expires_after` must be an object."
        raise InvalidRequest(message, param="output_expires_after")
    return check_expiry(value.get("anchor"), value.get("seconds"), "output_expires_after")
