"""The request body: parsed once, checked where we govern, passed on otherwise as it came."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from serve_app.completions.caps import check_caps, check_max_tokens, is_whole
from serve_app.completions.kinds import Kind, kinds_of
from serve_app.completions.media import check_media
from serve_app.config import MOST_PRIORITY, Caps, GatewayConfig, ModelEntry, Standing
from serve_app.errors import InvalidRequest, MalformedBody, ModelNotFound, UnsupportedParameter
from serve_app.identity.principal import Principal

_NAME = re.compile(rb'"\s*:')
_STREAM_OPTIONS = frozenset({"include_usage"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A checked request: what the path needs to know, and the bytes that go to the engine.

    It makes `choices` answers, each of `max_tokens` at most. `repeated_bytes` of the payload are
    read once with each of its prompts.
    """

    kind: Kind
    model: ModelEntry
    stream: bool
    wants_usage: bool
    prompts: int
    choices: int
    max_tokens: int
    repeated_bytes: int
    standing: Standing
    payload: bytes
    # Fields of the answer that the engine does not know.
    told: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a request gets where it names no value."""

    max_tokens: int
    temperature: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a body is held against: the installation, the policy, and who asks."""

    defaults: Defaults
    caps: Caps
    standing: Standing
    remote_media: bool


def parse_object(raw: bytes) -> dict[str, Any]:
    """Return the JSON object in `raw`. Raises MalformedBody for anything else."""
    # A whole number over 64 bits becomes a float. What was checked is what the engine gets all
    # the same, because the body is written anew.
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        # Its message gives the place and never quotes the text.
        raise MalformedBody(f"The request body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise MalformedBody("The request body must be a JSON object.")
    _refuse_repeated(raw, body)
    return body


def _refuse_repeated(raw: bytes, body: dict[str, Any]) -> None:
    """Raise MalformedBody where an object names a field twice: which one holds is not said."""
    # Written out again, a body has fewer names only if one was there twice. Only where the
    # counts differ, which a text with escapes can do too, is it worth the slow parser.
    if len(_NAME.findall(raw)) != len(_NAME.findall(dump_body(body))):
        json.loads(raw, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise MalformedBody("The request body names a field of an object twice.")
    return found


def model_name(body: dict[str, Any], default: str | None = None) -> str:
    """Return the `model` of a body. Raises InvalidRequest where there is none."""
    name = body.get("model")
    if name is None and default is not None:
        return default
    if not isinstance(name, str) or not name:
        raise InvalidRequest("`model` must be the name of a model.", param="model")
    return name


def find_model(config: GatewayConfig, name: str, principal: Principal) -> ModelEntry:
    """Return the entry of the model that is called `name`, or has it as an alias.

    Raises:
        ModelNotFound: there is none, or `principal` may not use it; the same to a caller.
    """
    model = config.model(name)
    if model is None or not principal.may_use(model):
        raise ModelNotFound(
            f"The model `{name[:100]}` does not exist or you may not use it. "
            "GET /v1/models lists the models that you may use.",
            param="model",
            denied=None if model is None else f"model:{model.name}",
        )
    return model


def govern(kind: Kind, body: dict[str, Any], model: ModelEntry, rules: Rules) -> Ask:
    """Check the fields that we govern, fill in defaults, and return what to send.

    Raises:
        UnsupportedParameter: a field that would not be honoured.
        InvalidRequest: a governed field with a wrong value, or a model for something else.
        MalformedBody: nested too deeply.
    """
    _check_task(kind, model)
    _refuse_unknown(kind, body)
    stream = _flag(body, "stream")
    _check_store(kind, body)
    wants_usage = _wants_usage(body, stream=stream)
    prompts = kind.endpoint.count(body)
    check_media(body, remote=rules.remote_media)
    check_caps(kind, body, prompts, rules.caps)
    most_tokens = model.max_tokens or rules.defaults.max_tokens
    check_max_tokens(kind, body, most_tokens)
    standing = _standing(body, rules.standing)
    sent = _sent(kind, body, model, rules.defaults, most_tokens, standing)
    return Ask(
        kind=kind,
        model=model,
        stream=stream,
        wants_usage=wants_usage,
        prompts=prompts,
        choices=prompts * (sent.get("n") or 1),
        max_tokens=max((sent.get(name) or 0 for name in kind.endpoint.max_tokens), default=0),
        repeated_bytes=_repeated_bytes(kind, sent),
        standing=standing,
        payload=dump_body(sent),
    )


def _repeated_bytes(kind: Kind, sent: dict[str, Any]) -> int:
    """Return how long that part of the body is which is read with each prompt."""
    alone = (sent.get(name) for name in kind.endpoint.repeated)
    return sum(
        len(orjson.dumps(value))
        for value in alone
        if value is not None and not (isinstance(value, list) and len(value) > 1)
    )


def dump_body(sent: dict[str, Any]) -> bytes:
    """Return a body as bytes. Raises MalformedBody where it is nested too deeply."""
    try:
        # A copy, as long as it is: orjson's own keeps a buffer of 4 KiB for as long as the answer.
        return bytes(memoryview(orjson.dumps(sent)))
    except orjson.JSONEncodeError:
        # It came out of JSON, so what cannot go back is deeper than orjson writes.
        raise MalformedBody("The request body is nested too deeply.") from None


def _check_task(kind: Kind, model: ModelEntry) -> None:
    if model.task not in kind.endpoint.tasks:
        served = ", ".join(f"`{one.route}`" for one in kinds_of(model.task))
        raise InvalidRequest(
            f"The model `{model.name}` does not serve `{kind.route}`. It serves {served}.",
            param="model",
        )


def _refuse_unknown(kind: Kind, body: dict[str, Any]) -> None:
    for name, value in body.items():
        if name not in kind.endpoint.parameters and value is not None:
            raise UnsupportedParameter(
                f"The parameter `{name[:100]}` is not supported. Leave it out.", param=name[:100]
            )


def _check_store(kind: Kind, body: dict[str, Any]) -> None:
    """Refuse to keep an answer that nobody could retrieve; responses have a store of their own."""
    if kind is not Kind.RESPONSES and _flag(body, "store"):
        raise UnsupportedParameter(
            "`store: true` is not supported here: completions cannot be retrieved. Leave it out, "
            "or use `/v1/responses`.",
            param="store",
        )


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise InvalidRequest(f"`{name}` must be true or false.", param=name)
    return value


def _wants_usage(body: dict[str, Any], *, stream: bool) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    if not stream:
        raise InvalidRequest(
            "`stream_options` is allowed only with `stream: true`.", param="stream_options"
        )
    if not isinstance(options, dict):
        raise InvalidRequest("`stream_options` must be an object.", param="stream_options")
    for name in options.keys() - _STREAM_OPTIONS:
        param = f"stream_options.{name[:100]}"
        raise UnsupportedParameter(f"The parameter `{param}` is not supported.", param=param)
    return _flag(options, "include_usage")


def _standing(body: dict[str, Any], own: Standing) -> Standing:
    """Return the standing of the request, which is its principal's or a later place."""
    asked = body.get("priority")
    if asked is None:
        return own
    if not is_whole(asked) or not own.priority <= asked <= MOST_PRIORITY:
        raise InvalidRequest(
            f"`priority` must be a whole number from {own.priority} to {MOST_PRIORITY}; "
            f"yours is {own.priority}, and a higher number is served later.",
            param="priority",
        )
    return own.model_copy(update={"priority": asked})


def _sent(
    kind: Kind,
    body: dict[str, Any],
    model: ModelEntry,
    defaults: Defaults,
    most_tokens: int,
    standing: Standing,
) -> dict[str, Any]:
    """Return the body for the engine: what came, with what we fill in and set."""
    sent = {**body, "model": model.engine_name or model.name}
    # An engine that does not schedule by priority takes the number and ignores it.
    sent.pop("priority", None)
    if kind is not Kind.RESPONSES:
        # It says what we keep; of an engine it asks nothing.
        sent.pop("store", None)
    if model.priority and "priority" in kind.endpoint.parameters:
        sent["priority"] = standing.priority
    if sent.get("stream") and kind.endpoint.stream_options:
        # Always asked for, so that the accounts have it; dropped where the client did not.
        sent["stream_options"] = {"include_usage": True}
    names = kind.endpoint.max_tokens
    if names and sent.get("temperature") is None:
        sent["temperature"] = defaults.temperature
    if names and all(sent.get(name) is None for name in names):
        sent[names[-1]] = _tokens_unnamed(kind, model, most_tokens)
    return sent


def _tokens_unnamed(kind: Kind, model: ModelEntry, most: int) -> int:
    """Return the completion tokens of a request that names no number."""
    # Never left to the engine alone: it would generate up to the end of its context.
    named = model.default_max_tokens or kind.endpoint.engine_max_tokens or most
    return min(named, most)
