"""The body of an upload: multipart/form-data, kept on disk until all of it is here."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from serve_app.batches.files import BATCH_INPUT, CHUNK_BYTES
from serve_app.errors import BodyTooLarge, InvalidRequest, UnsupportedParameter

# What stands around the file in the body.
_FORM_BYTES = 64 * 1024
_MAX_FIELD_BYTES = 4096
_MAX_NAME_CHARS = 255
_FIELDS = frozenset({"file", "purpose", "expires_after[anchor]", "expires_after[seconds]"})
KEEP_S = range(3600, 2_592_000 + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """A file that came in whole."""

    filename: str
    size_bytes: int
    expires_after_s: int | None
    file: UploadFile

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the content."""
        while chunk := await self.file.read(CHUNK_BYTES):
            yield chunk


@asynccontextmanager
async def receive_upload(request: Request, max_bytes: int) -> AsyncIterator[Upload]:
    """Read an upload, and forget it at the end of the block.

    Raises:
        BodyTooLarge: the file has more than `max_bytes`.
        InvalidRequest: no form, or a field of it is missing or wrong.
    """
    form = await _parse(request, max_bytes)
    try:
        yield _checked(form, max_bytes)
    finally:
        await form.close()


async def _parse(request: Request, max_bytes: int) -> FormData:
    kind = request.headers.get("content-type", "")
    if not kind.lower().startswith("multipart/form-data"):
        raise InvalidRequest("Send the file as multipart/form-data.")
    parser = MultiPartParser(
        request.headers,
        _bounded(request, max_bytes),
        max_files=1,
        max_fields=len(_FIELDS),
        max_part_size=_MAX_FIELD_BYTES,
    )
    try:
        return await parser.parse()
    except MultiPartException as error:
        raise InvalidRequest(f"The form cannot be read: {error.message}") from None


async def _bounded(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes + _FORM_BYTES:
        raise _too_large(max_bytes)
    read_bytes = 0
    async for part in request.stream():
        read_bytes += len(part)
        if read_bytes > max_bytes + _FORM_BYTES:
            raise _too_large(max_bytes)
        yield part


def _checked(form: FormData, max_bytes: int) -> Upload:
    for name in form.keys() - _FIELDS:
        param = name[:100]
        raise UnsupportedParameter(f"The field `{param}` is not supported.", param=param)
    purpose = form.get("purpose")
    if purpose != BATCH_INPUT:
        said = f"not `{purpose[:100]}`" if isinstance(purpose, str) else "and is missing"
        raise InvalidRequest(f"`purpose` must be `{BATCH_INPUT}`, {said}.", param="purpose")
    file = form.get("file")
    if not isinstance(file, UploadFile) or not file.size:
        raise InvalidRequest("`file` must be a file that is not empty.", param="file")
    if file.size > max_bytes:
        raise _too_large(max_bytes)
    return Upload(
        filename=_harmless(file.filename),
        size_bytes=file.size,
        expires_after_s=_expires_after_s(form),
        file=file,
    )


def _expires_after_s(form: FormData) -> int | None:
    anchor, seconds = form.get("expires_after[anchor]"), form.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    number = int(seconds) if isinstance(seconds, str) and seconds.isdecimal() else None
    return check_expiry(anchor, number, "expires_after")


def check_expiry(anchor: object, seconds: object, param: str) -> int:
    """Return the seconds of OpenAI's expiry policy. Raises InvalidRequest where it is wrong."""
    if anchor != "created_at":
        raise InvalidRequest(f"`{param}.anchor` must be `created_at`.", param=f"{param}.anchor")
    if not isinstance(seconds, int) or isinstance(seconds, bool) or seconds not in KEEP_S:
        raise InvalidRequest(
            f"`{param}.seconds` must be a whole number from {KEEP_S[0]} to {KEEP_S[-1]}.",
            param=f"{param}.seconds",
        )
    return seconds


def _harmless(filename: str | None) -> str:
    printable = "".join(character for character in filename or "" if character.isprintable())
    return printable[:_MAX_NAME_CHARS] or "file"


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"The file is larger than {max_bytes} bytes.", param="file")
