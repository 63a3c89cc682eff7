"""What is read, checked and filled in of a request body."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from serve_app.completions.body import (
    Ask,
    Defaults,
    find_model,
    govern,
    model_name,
    parse_object,
)
from serve_app.completions.kinds import Kind
from serve_app.config import GatewayConfig, ModelEntry, Task
from serve_app.errors import (
    InvalidRequest,
    MalformedBody,
    ModelNotFound,
    UnsupportedParameter,
)
from serve_app.identity.principal import Permission, Principal
from serve_app.records import PrincipalKind

MODEL = ModelEntry(name="small", app="model-small", max_tokens=100)
DEFAULTS = Defaults(max_tokens=4096, temperature=0.7)
CHAT: dict[str, Any] = {"model": "small", "messages": [{"role": "user", "content": "Hi"}]}
TEXT: dict[str, Any] = {"model": "small", "prompt": "Hi"}


def ask(kind: Kind, body: dict[str, Any], model: ModelEntry = MODEL) -> Ask:
    return govern(kind, body, model, DEFAULTS)


def sent(kind: Kind, body: dict[str, Any], model: ModelEntry = MODEL) -> dict[str, Any]:
    payload: dict[str, Any] = orjson.loads(ask(kind, body, model).payload)
    return payload


def principal(models: frozenset[str] | None = None) -> Principal:
    return Principal(
        id="u", kind=PrincipalKind.USER, permissions=frozenset({Permission.USER}), models=models
    )


# Parsing.


@pytest.mark.parametrize(
    "raw", [b"", b"{", b'{"a":1', b'{"a":NaN}', b"\xff\xfe", b'{"a":"\xff"}', b'{"a":1}x', b"nul"]
)
def test_malformed_json_says_where(raw: bytes) -> None:
    with pytest.raises(MalformedBody, match=r"not valid JSON: .*line \d+ column \d+"):
        parse_object(raw)


def test_malformed_json_does_not_quote_the_text() -> None:
    with pytest.raises(MalformedBody) as caught:
        parse_object(b'{"prompt": "my secret" oops}')
    assert "secret" not in caught.value.message
    assert "oops" not in caught.value.message


@pytest.mark.parametrize("raw", [b"[]", b"1", b"null", b'"text"', b"true"])
def test_json_that_is_no_object(raw: bytes) -> None:
    with pytest.raises(MalformedBody, match="must be a JSON object"):
        parse_object(raw)


def test_nesting_without_end_is_refused() -> None:
    with pytest.raises(MalformedBody):
        parse_object(b'{"a":' * 100_000)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"model": "a", "model": "b"}',
        b'{"a": [{"b": {"c": 1, "c": 1}}]}',
        b'{"a" :1,"a"\n:2}',
        b'{"a": 1, "\\u0061": 2}',
    ],
)
def test_a_field_named_twice_is_refused(raw: bytes) -> None:
    with pytest.raises(MalformedBody, match="twice"):
        parse_object(raw)


@pytest.mark.parametrize(
    "body",
    [
        {"a": {"a": [{"a": 1}, {"a": 1}]}},
        {"a": 'say "a": 1, "a": 2 and "b" : 3'},
        {'"a":': '\\": "'},
        {"a": 1e300, "b": 2**64 - 1, "c": -(2**63)},
    ],
)
def test_names_that_only_look_repeated_pass(body: dict[str, Any]) -> None:
    assert parse_object(orjson.dumps(body)) == body
    assert parse_object(json.dumps(body, ensure_ascii=True).encode()) == body
    assert parse_object(json.dumps(body).replace('\\"', "\\u0022").encode()) == body


@pytest.mark.parametrize("value", [None, "", 1, ["small"], {}])
def test_model_must_be_a_name(value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        model_name({"model": value})
    assert caught.value.param == "model"


def test_unknown_model_and_forbidden_model_look_the_same() -> None:
    config = GatewayConfig(models=(MODEL, ModelEntry(name="secret", app="model-secret")))
    assert find_model(config, "small", principal()) is MODEL
    messages = []
    for name in ("secret", "absent"):
        with pytest.raises(ModelNotFound) as caught:
            find_model(config, name, principal(frozenset({"small"})))
        messages.append(caught.value.message.replace(name, "…"))
    assert messages[0] == messages[1]


# Parameters.


@pytest.mark.parametrize(("kind", "body"), [(Kind.CHAT, CHAT), (Kind.TEXT, TEXT)])
@pytest.mark.parametrize("name", ["n_best", "kv_transfer_params", "request_id", "priority", ""])
def test_unknown_parameter_is_refused_by_name(kind: Kind, body: dict[str, Any], name: str) -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        ask(kind, {**body, name: 1})
    assert caught.value.param == name
    assert f"`{name}`" in caught.value.message


def test_unknown_parameter_that_is_null_passes() -> None:
    assert ask(Kind.CHAT, {**CHAT, "function_call": None}).prompts == 1


def test_long_parameter_name_is_cut_in_the_message() -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        ask(Kind.CHAT, {**CHAT, "x" * 5000: 1})
    assert len(caught.value.message) < 200


@pytest.mark.parametrize("name", ["messages", "tools", "max_completion_tokens", "top_logprobs"])
def test_parameter_of_the_other_endpoint_is_refused(name: str) -> None:
    assert name in Kind.CHAT.endpoint.parameters
    with pytest.raises(UnsupportedParameter):
        ask(Kind.TEXT, {**TEXT, name: 1})


@pytest.mark.parametrize("value", [-1, 0, 101, True, False, 1.5, "5", [5], {}])
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_max_tokens_out_of_range(name: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match="a whole number from 1 to 100") as caught:
        ask(Kind.CHAT, {**CHAT, name: value})
    assert caught.value.param == name


@pytest.mark.parametrize("value", [1, 100, None])
def test_max_tokens_in_range(value: int | None) -> None:
    assert sent(Kind.TEXT, {**TEXT, "max_tokens": value})["max_tokens"] == value


def test_max_tokens_of_the_installation_holds_where_the_model_says_nothing() -> None:
    model = ModelEntry(name="small", app="model-small")
    assert ask(Kind.TEXT, {**TEXT, "max_tokens": 4096}, model)
    with pytest.raises(InvalidRequest, match="from 1 to 4096"):
        ask(Kind.TEXT, {**TEXT, "max_tokens": 4097}, model)


# Streaming.


@pytest.mark.parametrize(("value", "stream"), [(True, True), (False, False), (None, False)])
def test_stream_flag(value: bool | None, stream: bool) -> None:
    assert ask(Kind.CHAT, {**CHAT, "stream": value}).stream is stream


@pytest.mark.parametrize("value", [0, 1, "true", [], {}])
def test_stream_must_be_a_flag(value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ask(Kind.CHAT, {**CHAT, "stream": value})
    assert caught.value.param == "stream"


@pytest.mark.parametrize(
    ("options", "wants"),
    [
        (None, False),
        ({}, False),
        ({"include_usage": None}, False),
        ({"include_usage": False}, False),
        ({"include_usage": True}, True),
    ],
)
def test_usage_is_always_asked_of_the_engine(options: object, wants: bool) -> None:
    body = {**CHAT, "stream": True, "stream_options": options}
    assert ask(Kind.CHAT, body).wants_usage is wants
    assert sent(Kind.CHAT, body)["stream_options"] == {"include_usage": True}


def test_usage_is_not_asked_for_without_a_stream() -> None:
    assert "stream_options" not in sent(Kind.CHAT, CHAT)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"stream_options": {}}, "stream_options"),
        ({"stream": False, "stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": []}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "include_usage"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
        ),
    ],
)
def test_stream_options_that_would_not_be_honoured(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ask(Kind.CHAT, {**CHAT, **body})
    assert caught.value.param == param


# Prompts.


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("Hi", 1), (["a", "b", "c"], 3), ([1, 2, 3], 1), ([[1, 2], [3]], 2)],
)
def test_prompts_are_counted(prompt: object, count: int) -> None:
    assert ask(Kind.TEXT, {**TEXT, "prompt": prompt}).prompts == count


@pytest.mark.parametrize("prompt", ["", [], None, 1, {}, True])
def test_prompt_must_be_there(prompt: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ask(Kind.TEXT, {**TEXT, "prompt": prompt})
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("messages", [None, [], "Hi", {}, 1])
def test_messages_must_be_there(messages: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ask(Kind.CHAT, {**CHAT, "messages": messages})
    assert caught.value.param == "messages"


def test_tokens_and_embeddings_are_not_sampled() -> None:
    """What belongs to generating is neither filled in nor taken."""
    model = ModelEntry(name="v", app="v", task=Task.EMBED, default_max_tokens=7)
    body = {"model": "v", "input": ["a", "b"]}
    assert ask(Kind.EMBEDDINGS, body, model).prompts == 2
    assert sent(Kind.EMBEDDINGS, body, model) == body
    for name in ("stream", "temperature", "max_tokens"):
        with pytest.raises(UnsupportedParameter):
            ask(Kind.EMBEDDINGS, {**body, name: 1}, model)


@pytest.mark.parametrize(
    ("task", "kind", "serves"),
    [
        (Task.GENERATE, Kind.EMBEDDINGS, "`chat.completions`, `completions`, `tokenize`"),
        (Task.EMBED, Kind.CHAT, "`embeddings`, `rerank`, `score`, `tokenize`, `detokenize`"),
        (Task.SCORE, Kind.EMBEDDINGS, "`rerank`, `score`, `tokenize`, `detokenize`"),
    ],
)
def test_a_model_for_something_else_says_what_it_serves(
    task: Task, kind: Kind, serves: str
) -> None:
    model = ModelEntry(name="other", app="a", task=task)
    with pytest.raises(InvalidRequest) as caught:
        ask(kind, {"model": "other"}, model)
    assert caught.value.param == "model"
    assert f"`other` does not serve `{kind.route}`. It serves {serves}" in caught.value.message


# Defaults.


@pytest.mark.parametrize(("named", "filled"), [({}, 0.7), ({"temperature": None}, 0.7)])
def test_temperature_is_filled_in(named: dict[str, Any], filled: float) -> None:
    assert sent(Kind.CHAT, {**CHAT, **named})["temperature"] == filled


def test_temperature_of_zero_is_kept() -> None:
    assert sent(Kind.CHAT, {**CHAT, "temperature": 0})["temperature"] == 0


@pytest.mark.parametrize(
    ("kind", "body", "name"),
    [(Kind.CHAT, CHAT, "max_completion_tokens"), (Kind.TEXT, TEXT, "max_tokens")],
)
def test_max_tokens_is_filled_in_from_the_model(
    kind: Kind, body: dict[str, Any], name: str
) -> None:
    model = MODEL.model_copy(update={"default_max_tokens": 7})
    assert sent(kind, body, model)[name] == 7
    assert sent(kind, {**body, "max_tokens": 3}, model)["max_tokens"] == 3
    assert name not in sent(kind, body, MODEL)


def test_the_rest_is_passed_on_as_it_came() -> None:
    body = {**CHAT, "temperature": 1, "stop": ["a"], "tools": [{"x": {"y": None}}], "seed": 2**53}
    assert sent(Kind.CHAT, body) == body


def test_the_body_that_came_is_not_changed() -> None:
    body = {**CHAT, "stream": True}
    ask(Kind.CHAT, body)
    assert body == {**CHAT, "stream": True}


# Anything.

_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
_PARAMETERS = sorted({name for kind in Kind for name in kind.endpoint.parameters})
_NAMES = st.sampled_from(_PARAMETERS) | st.text(max_size=8)
_DEEP = json.loads("[" * 300 + "]" * 300)


@given(
    kind=st.sampled_from(Kind),
    base=st.sampled_from([{}, CHAT, TEXT]),
    more=st.dictionaries(_NAMES, _JSON, max_size=6),
)
@example(kind=Kind.CHAT, base=CHAT, more={"tools": _DEEP})
@example(kind=Kind.TEXT, base=TEXT, more={"prompt": ["a", _DEEP]})
def test_any_object_is_asked_or_refused(
    kind: Kind, base: dict[str, Any], more: dict[str, Any]
) -> None:
    asked = None
    with contextlib.suppress(InvalidRequest):
        body = parse_object(json.dumps({**base, **more}).encode("utf-8", "replace"))
        model = MODEL.model_copy(update={"task": min(kind.endpoint.tasks)})
        asked = ask(kind, body, model)
    assert asked is None or isinstance(orjson.loads(asked.payload), dict)
