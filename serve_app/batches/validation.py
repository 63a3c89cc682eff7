"""The input file of a batch: split into lines, each of them checked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import orjson

from serve_app.completions.body import find_model, model_name, parse_object
from serve_app.config import GatewayConfig
from serve_app.errors import InvalidRequest, MalformedBody, ModelNotFound
from serve_app.identity.principal import Principal

MAX_ERRORS = 100
_MAX_CUSTOM_ID_CHARS = 512
# What makes an answer that is not whole when it is there.
_NOT_HERE = ("stream", "background")
_FIELDS = frozenset({"custom_id", "method", "url", "body"})


@dataclass(frozen=True, slots=True, kw_only=True)
class LineError:
    """Why a batch is not run: OpenAI's error of a batch. `line` None is the file as a whole."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LineRequest:
    """One request that may be run."""

    number: int
    custom_id: str
    body: bytes


class _Wrong(Exception):
    """A line is wrong."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(code)
        self.code = code
        self.message = message
        self.param = param


class LineSplitter:
    """Cuts chunks of bytes into numbered lines; holds no more than one line and one chunk.

    A line longer than `max_bytes` comes out as None.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._rest = bytearray()
        self._too_long = False
        self._number = 0

    def feed(self, chunk: bytes) -> Iterator[tuple[int, bytes | None]]:
        """Yield the lines that end in `chunk`."""
        *ended, rest = chunk.split(b"\n")
        for part in ended:
            self._add(part)
            yield self._take()
        self._add(rest)

    def last(self) -> Iterator[tuple[int, bytes | None]]:
        """Yield what stands behind the last line end, if anything does."""
        if self._rest or self._too_long:
            yield self._take()

    def _add(self, part: bytes) -> None:
        if len(self._rest) + len(part) > self._max_bytes:
            self._too_long = True
            self._rest.clear()
        elif not self._too_long:
            self._rest += part

    def _take(self) -> tuple[int, bytes | None]:
        self._number += 1
        line = None if self._too_long else bytes(self._rest)
        self._rest.clear()
        self._too_long = False
        return self._number, line


class LineChecker:
    """Checks the lines of one file, and remembers what must be unique and what was wrong."""

    def __init__(self, config: GatewayConfig, principal: Principal, endpoint: str) -> None:
        self._config = config
        self._principal = principal
        self._endpoint = endpoint
        self._custom_ids: set[str] = set()
        self._models: set[str] = set()
        # What the principal was refused, for the audit log.
        self.denied: set[str] = set()
        self._total = 0
        self._errors: list[LineError] = []

    @property
    def total(self) -> int:
        """Lines that hold a request."""
        return self._total

    @property
    def full(self) -> bool:
        """Whether there is no sense in reading on."""
        return len(self._errors) >= MAX_ERRORS or self._total > self._config.batches.max_lines

    @property
    def model(self) -> str | None:
        """The model of all lines, or None where they name several."""
        return next(iter(self._models)) if len(self._models) == 1 else None

    def errors(self) -> list[dict[str, Any]]:
        """Return what is wrong with the file, once it was read."""
        most = self._config.batches.max_lines
        if self._total > most:
            message = f"The file holds more than {most} requests. Split it into several batches."
            return [asdict(LineError(code="too_many_requests", message=message))]
        if self._total == 0:
            message = "The file holds no request."
            return [asdict(LineError(code="empty_file", message=message))]
        return [asdict(error) for error in self._errors]

    def check(self, number: int, raw: bytes | None) -> LineRequest | None:
        """Return the request of a line, or None where it is empty or wrong."""
        if raw is not None and not raw.strip():
            return None
        self._total += 1
        try:
            return self._request(number, raw)
        except _Wrong as wrong:
            self._errors.append(
                LineError(code=wrong.code, message=wrong.message, param=wrong.param, line=number)
            )
            return None

    def _request(self, number: int, raw: bytes | None) -> LineRequest:
        line = self._parsed(raw)
        for name in line.keys() - _FIELDS:
            message = f"The field `{name[:100]}` is not known. Leave it out."
            raise _Wrong("unknown_parameter", message, name[:100])
        custom_id = self._custom_id(line)
        if line.get("method") != "POST":
            raise _Wrong("invalid_method", "`method` must be POST.", "method")
        if line.get("url") != self._endpoint:
            message = f"`url` must be the endpoint of the batch, {self._endpoint}."
            raise _Wrong("invalid_url", message, "url")
        body = self._body(line)
        self._custom_ids.add(custom_id)
        return LineRequest(number=number, custom_id=custom_id, body=body)

    def _parsed(self, raw: bytes | None) -> dict[str, Any]:
        if raw is None:
            most = self._config.max_body_bytes
            raise _Wrong("line_too_long", f"The line is longer than {most} bytes.")
        try:
            return parse_object(raw)
        except MalformedBody:
            message = "The line is no JSON object, or it names a field twice."
            raise _Wrong("invalid_json_line", message) from None

    def _custom_id(self, line: dict[str, Any]) -> str:
        custom_id = line.get("custom_id")
        good = isinstance(custom_id, str) and 0 < len(custom_id) <= _MAX_CUSTOM_ID_CHARS
        if not isinstance(custom_id, str) or not good or "\x00" in custom_id:
            message = f"`custom_id` must be a text of 1 to {_MAX_CUSTOM_ID_CHARS} characters."
            raise _Wrong("invalid_custom_id", message, "custom_id")
        if custom_id in self._custom_ids:
            message = "Another line has this `custom_id`. Each must be unique in the file."
            raise _Wrong("duplicate_custom_id", message, "custom_id")
        return custom_id

    def _body(self, line: dict[str, Any]) -> bytes:
        body = line.get("body")
        if not isinstance(body, dict):
            raise _Wrong("invalid_request", "`body` must be an object.", "body")
        for name in _NOT_HERE:
            if body.get(name):
                message = f"`{name}` cannot be used in a batch."
                raise _Wrong("unsupported_parameter", message, f"body.{name}")
        self._models.add(self._model(body))
        try:
            return orjson.dumps(body)
        except orjson.JSONEncodeError:
            # It came out of JSON, so what cannot go back is deeper than orjson writes.
            raise _Wrong("invalid_json_line", "The line is nested too deeply.") from None

    def _model(self, body: dict[str, Any]) -> str:
        try:
            name = model_name(body, self._config.default_model)
            find_model(self._config, name, self._principal)
        except ModelNotFound as error:
            if error.denied is not None:
                self.denied.add(error.denied)
            raise _Wrong("model_not_found", error.message, "body.model") from None
        except InvalidRequest as error:
            raise _Wrong("missing_required_parameter", error.message, "body.model") from None
        return name
