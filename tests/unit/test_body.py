"""What is read, checked and filled in of a request body."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from serve_app.completions.body import (
    Ask,
    Defaults,
    Rules,
    find_model,
    govern,
    model_name,
    parse_object,
)
from serve_app.completions.kinds import Kind
from serve_app.config import Caps, GatewayConfig, ModelEntry, Standing, Task
from serve_app.errors import (
    InvalidRequest,
    MalformedBody,
    ModelNotFound,
    UnsupportedParameter,
)
from serve_app.identity.principal import Permission, Principal
from serve_app.records import PrincipalKind

MODEL = ModelEntry(name="small", app="model-small", max_tokens=100)
RULES = Rules(
    defaults=Defaults(max_tokens=4096, temperature=0.7),
    caps=Caps(max_n=4, max_choices=6, max_prompts=3, max_messages=2, max_stop=2),
    standing=Standing(priority=5, weight=2),
    remote_media=False,
)
CHAT: dict[str, Any] = {"model": "small", "messages": [{"role": "user", "content": "Hi"}]}
TEXT: dict[str, Any] = {"model": "small", "prompt": "Hi"}


def ask(kind: Kind, body: dict[str, Any], model: ModelEntry = MODEL, rules: Rules = RULES) -> Ask:
    return govern(kind, body, model, rules)


def sent(kind: Kind, body: dict[str, Any], model: ModelEntry = MODEL) -> dict[str, Any]:
    payload: dict[str, Any] = orjson.loads(ask(kind, body, model).payload)
    return payload


def refused(kind: Kind, body: dict[str, Any], rules: Rules = RULES) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        ask(kind, body, rules=rules)
    return caught.value


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
@pytest.mark.parametrize("name", ["n_best", "kv_transfer_params", "request_id", "best_of", ""])
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


@pytest.mark.parametrize("value", [1, 100])
def test_max_tokens_in_range(value: int) -> None:
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


# Caps.


@pytest.mark.parametrize(
    ("kind", "more", "param", "told"),
    [
        (Kind.CHAT, {"n": 5}, "n", "`n` is 5; it must be a whole number from 1 to 4"),
        (Kind.TEXT, {"n": 4, "prompt": ["a", "b"]}, "n", "makes 8 answers; at most 6"),
        (Kind.TEXT, {"prompt": ["a"] * 4}, "prompt", "holds 4 prompts; at most 3"),
        (Kind.CHAT, {"messages": [{}] * 3}, "messages", "holds 3 messages; at most 2"),
        (Kind.TOKENIZE, {"messages": [{}] * 3}, "messages", "holds 3 messages; at most 2"),
        (Kind.CHAT, {"stop": ["a"] * 3}, "stop", "holds 3 texts; at most 2"),
        (Kind.CHAT, {"max_tokens": 101}, "max_tokens", "is 101; it must be a whole number from 1"),
    ],
)
def test_over_a_cap(kind: Kind, more: dict[str, Any], param: str, told: str) -> None:
    base = {"model": "small"} if kind is Kind.TOKENIZE else TEXT if kind is Kind.TEXT else CHAT
    error = refused(kind, {**base, **more})
    assert error.param == param
    assert told in error.message


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (Kind.CHAT, {"n": 4}),
        (Kind.CHAT, {"n": None}),
        (Kind.TEXT, {"n": 3, "prompt": ["a", "b"]}),
        (Kind.TEXT, {"prompt": ["a"] * 3}),
        (Kind.TEXT, {"prompt": [1, 2, 3, 4, 5]}),
        (Kind.CHAT, {"messages": [{}] * 2}),
        (Kind.CHAT, {"stop": ["a", "b"]}),
        (Kind.CHAT, {"stop": "abcdef"}),
    ],
)
def test_at_a_cap(kind: Kind, more: dict[str, Any]) -> None:
    assert ask(kind, {**(TEXT if kind is Kind.TEXT else CHAT), **more})


@pytest.mark.parametrize("value", [0, -1, True, False, 1.0, "1", [1], {}, 2**70, 1e300])
def test_n_must_be_a_number_of_answers(value: object) -> None:
    body = parse_object(json.dumps({**CHAT, "n": value}).encode())
    error = refused(Kind.CHAT, body)
    assert error.param == "n"
    assert len(error.message) < 150


# Priority.


@pytest.mark.parametrize(
    ("asked", "given"), [({}, 5), ({"priority": None}, 5), ({"priority": 9}, 9)]
)
def test_a_request_may_take_a_later_place(asked: dict[str, Any], given: int) -> None:
    assert ask(Kind.CHAT, {**CHAT, **asked}).standing == Standing(priority=given, weight=2)


@pytest.mark.parametrize("value", [4, -(2**40), 1001, True, "9", 5.0])
def test_a_request_may_not_take_an_earlier_place(value: object) -> None:
    error = refused(Kind.CHAT, {**CHAT, "priority": value})
    assert error.param == "priority"
    assert "from 5 to 1000" in error.message


def test_an_engine_is_told_the_priority_where_it_schedules_by_it() -> None:
    by_priority = MODEL.model_copy(update={"priority": True})
    assert sent(Kind.CHAT, CHAT, by_priority)["priority"] == 5
    assert sent(Kind.TEXT, {**TEXT, "priority": 7}, by_priority)["priority"] == 7
    assert "priority" not in sent(Kind.TOKENIZE, TEXT, by_priority)
    assert "priority" not in sent(Kind.CHAT, {**CHAT, "priority": 7})


# Names.


def test_an_engine_is_asked_for_the_model_by_its_own_name() -> None:
    assert sent(Kind.CHAT, {**CHAT, "model": "an-alias"})["model"] == "small"
    renamed = MODEL.model_copy(update={"engine_name": "small-2"})
    assert sent(Kind.CHAT, CHAT, renamed)["model"] == "small-2"


def test_a_body_without_a_model_gets_the_default() -> None:
    assert model_name({}, "small") == model_name({"model": None}, "small") == "small"
    assert model_name({"model": "other"}, "small") == "other"
    with pytest.raises(InvalidRequest):
        model_name({"model": ""}, "small")


def test_an_alias_leads_to_its_model_and_its_permission() -> None:
    model = ModelEntry(name="org/real", app="a", aliases=("gpt-4o-mini",))
    config = GatewayConfig(models=(MODEL, model))
    assert find_model(config, "gpt-4o-mini", principal(frozenset({"org/real"}))) is model
    with pytest.raises(ModelNotFound) as caught:
        find_model(config, "gpt-4o-mini", principal(frozenset({"gpt-4o-mini"})))
    assert "org/real" not in caught.value.message


# Pictures, sound and film.

PICTURE = "data:image/png;base64,iVBORw0KGgo="


def chat_with(part: dict[str, Any]) -> dict[str, Any]:
    content = [{"type": "text", "text": "What is it? http://here"}, part]
    return {**CHAT, "messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": PICTURE}},
        {"type": "image_url", "image_url": PICTURE},
        {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}},
    ],
)
def test_what_comes_along_in_the_body_passes(part: dict[str, Any]) -> None:
    body = chat_with(part)
    assert sent(Kind.CHAT, body)["messages"] == body["messages"]


_ADDRESSES = [
    "http://169.254.169.254/latest/meta-data",
    "https://intranet/x.png",
    "HTTP://intranet/",
    "file:///etc/passwd",
    " http://intranet/",
    "//intranet/x.png",
    "",
]


@pytest.mark.parametrize("url", _ADDRESSES)
@pytest.mark.parametrize("name", ["image_url", "audio_url", "video_url"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_the_engine_is_sent_to_no_address(url: str, name: str, wrapped: bool) -> None:
    error = refused(Kind.CHAT, chat_with({name: {"url": url} if wrapped else url}))
    assert isinstance(error, UnsupportedParameter)
    assert error.param == f"messages.0.content.1.{name}"
    assert "intranet" not in error.message


@pytest.mark.parametrize(
    ("task", "kind", "body", "param"),
    [
        (
            Task.SCORE,
            Kind.RERANK,
            {"query": "q", "documents": [{"content": [{"image_url": {"url": "http://x"}}]}]},
            "documents.0.content.0.image_url",
        ),
        (
            Task.EMBED,
            Kind.EMBEDDINGS,
            {"input": [{"role": "user", "content": [{"image_url": "http://x"}]}]},
            "input.0.content.0.image_url",
        ),
    ],
)
def test_no_other_endpoint_sends_it_there_either(
    task: Task, kind: Kind, body: dict[str, Any], param: str
) -> None:
    model = ModelEntry(name="m", app="a", task=task)
    with pytest.raises(UnsupportedParameter) as caught:
        ask(kind, {"model": "m", **body}, model)
    assert caught.value.param == param


def test_the_policy_may_let_the_engine_fetch() -> None:
    rules = replace(RULES, remote_media=True)
    for url in ("https://x/y.png", "http://x/y.png", PICTURE):
        assert ask(Kind.CHAT, chat_with({"image_url": url}), rules=rules)
    assert refused(Kind.CHAT, chat_with({"image_url": "file:///etc/passwd"}), rules)


def test_a_tool_may_speak_of_addresses() -> None:
    schema = {"properties": {"image_url": {"type": "string", "url": "http://example"}}}
    assert ask(Kind.CHAT, {**CHAT, "tools": [{"function": {"parameters": schema}}]})


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
        (Task.GENERATE, Kind.EMBEDDINGS, "`chat.completions`, `completions`, `responses`"),
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
    assert sent(kind, {**body, name: None}, model)[name] == 7
    assert sent(kind, {**body, "max_tokens": 3}, model)["max_tokens"] == 3


@pytest.mark.parametrize(
    ("kind", "body", "name", "most", "filled"),
    [
        (Kind.CHAT, CHAT, "max_completion_tokens", 100, 100),
        # What the engine makes of a text by itself, as OpenAI does.
        (Kind.TEXT, TEXT, "max_tokens", 100, 16),
        (Kind.TEXT, TEXT, "max_tokens", 10, 10),
    ],
)
def test_the_cap_holds_where_no_number_is_named(
    kind: Kind, body: dict[str, Any], name: str, most: int, filled: int
) -> None:
    model = MODEL.model_copy(update={"max_tokens": most})
    assert sent(kind, body, model)[name] == filled
    assert sent(kind, {**body, "max_tokens": None}, model)[name] == filled
    beyond = model.model_copy(update={"default_max_tokens": 5000})
    assert sent(kind, body, beyond)[name] == most


def test_the_rest_is_passed_on_as_it_came() -> None:
    body = {
        **CHAT,
        "temperature": 1,
        "stop": ["a"],
        "max_tokens": 9,
        "tools": [{"x": {"y": None}}],
        "seed": 2**53,
    }
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
