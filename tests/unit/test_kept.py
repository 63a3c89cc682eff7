"""What is kept of a request: the strictest word that applies, and a shape without any text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.body_shape import shape_of
from serve_app.completions.kept import asked_by_body, asked_by_header
from serve_app.config import Bodies, BodiesConfig, GatewayConfig, parse_config
from serve_app.errors import ConfigError, InvalidRequest

NONE, METADATA, REDACTED, FULL = Bodies
MODELS = [{"name": "small", "app": "model-small", "aliases": ["tiny"]}]

EXCEPTIONS = {
    "default": "none",
    "models": {"small": "full"},
    "roles": {"tester": "redacted", "works-council": "none"},
}


def policy(bodies: object) -> BodiesConfig:
    return parse_config(GatewayConfig, {"models": MODELS, "bodies": bodies}, "user_config").bodies


@pytest.mark.parametrize(
    ("given", "model", "roles", "others", "kept"),
    [
        ({}, "small", (), (), FULL),
        ("none", "small", (), (), NONE),
        ("redacted", None, (), (), REDACTED),
        ({"models": {"small": "none"}}, "small", (), (), NONE),
        ({"models": {"small": "none"}}, "big", (), (), FULL),
        ({"models": {"small": "none"}}, None, (), (), FULL),
        # The default is for who is not named.
        ({"default": "none", "models": {"small": "full"}}, "small", (), (), FULL),
        ({"default": "none", "roles": {"staff": "redacted"}}, "small", ("staff",), (), REDACTED),
        ({"default": "none", "roles": {"staff": "redacted"}}, "small", ("other",), (), NONE),
        # Of several the strictest.
        ({"roles": {"a": "metadata", "b": "redacted"}}, "small", ("b", "a"), (), METADATA),
        ({"models": {"small": "full"}, "roles": {"a": "none"}}, "small", ("a",), (), NONE),
        # The table of docs/configuration.md.
        (EXCEPTIONS, "small", (), (), FULL),
        (EXCEPTIONS, "big", (), (), NONE),
        (EXCEPTIONS, "small", ("tester",), (), REDACTED),
        (EXCEPTIONS, "big", ("tester",), (), REDACTED),
        (EXCEPTIONS, "small", ("tester", "works-council"), (), NONE),
        (EXCEPTIONS, "big", ("tester", "works-council"), (), NONE),
        # A key or a caller gets less, never more.
        ("full", "small", (), (REDACTED, METADATA), METADATA),
        ("full", "small", (), (None, None), FULL),
        ("metadata", "small", (), (FULL,), METADATA),
        ({"default": "full", "models": {"small": "none"}}, "small", (), (FULL,), NONE),
    ],
)
def test_the_strictest_holds(
    given: object,
    model: str | None,
    roles: tuple[str, ...],
    others: tuple[Bodies | None, ...],
    kept: Bodies,
) -> None:
    assert policy(given).of(model, roles, *others) is kept


@given(
    default=st.sampled_from(Bodies),
    model=st.sampled_from(Bodies),
    role=st.sampled_from(Bodies),
    asked=st.lists(st.none() | st.sampled_from(Bodies), max_size=3),
)
def test_asking_never_gets_more(
    default: Bodies, model: Bodies, role: Bodies, asked: list[Bodies | None]
) -> None:
    made = policy({"default": default, "models": {"small": model}, "roles": {"staff": role}})
    for name in ("small", "big"):
        for roles in ((), ("staff",)):
            bare, with_them = made.of(name, roles), made.of(name, roles, *asked)
            assert with_them.rank <= bare.rank <= made.most.rank
            assert all(one is None or with_them.rank <= one.rank for one in asked)


@pytest.mark.parametrize(
    ("bodies", "setting"),
    [
        ("some", "user_config.bodies.default"),
        ({"models": {"small": "some"}}, "user_config.bodies.models.small"),
        ({"models": {"big": "none"}}, "user_config.bodies.models.big"),
        ({"models": {"tiny": "none"}}, "user_config.bodies.models.tiny"),
        ({"keys": {}}, "user_config.bodies.keys"),
    ],
)
def test_a_wrong_policy_stops_the_start(bodies: object, setting: str) -> None:
    with pytest.raises(ConfigError) as caught:
        policy(bodies)
    assert caught.value.setting == setting


@pytest.mark.parametrize(
    ("values", "asked"),
    [([], None), (["none"], NONE), ([" Metadata "], METADATA), (["full", "redacted"], REDACTED)],
)
def test_a_header_asks_for_less(values: list[str], asked: Bodies | None) -> None:
    assert asked_by_header(values) is asked


@pytest.mark.parametrize("value", ["", "nothing", "none, full", "0"])
def test_a_header_that_says_nothing_is_refused(value: str) -> None:
    with pytest.raises(InvalidRequest, match="none, metadata, redacted, full") as caught:
        asked_by_header([value])
    assert caught.value.param == "X-Comp-AI-Bodies"


@pytest.mark.parametrize(("store", "asked"), [(False, NONE), (True, None), (None, None), (0, None)])
def test_store_false_keeps_nothing(store: object, asked: Bodies | None) -> None:
    assert asked_by_body({"store": store}) is asked


def test_the_shape_of_a_chat() -> None:
    body = {
        "model": "small",
        "temperature": 0.5,
        "stream": True,
        "seed": None,
        "stop": ["one", "two"],
        "reasoning_effort": "low",
        "user": "ada",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
            {"role": "ROLE", "content": "Hi"},
            "Hello",
        ],
        "tools": [{"type": "function", "function": {"name": "weather", "description": "TEXT"}}],
        "response_format": {"type": "json_schema"},
    }
    assert orjson.loads(shape_of(body)) == {
        "model": {"characters": 5},
        "temperature": 0.5,
        "stream": True,
        "seed": None,
        "stop": {"items": 2, "characters": 6},
        "reasoning_effort": "low",
        "user": {"characters": 3},
        "messages": [
            {"role": "system", "characters": 9},
            {"role": "user", "characters": 9},
            {"characters": 6},
            {"characters": 5},
        ],
        "tools": ["weather"],
        "response_format": {"characters": 11},
    }


_TEXT = st.text(alphabet="\N{CYRILLIC SMALL LETTER A}\N{CYRILLIC SMALL LETTER BE}", min_size=1)
_VALUES = st.recursive(
    _TEXT | st.integers(-(2**53), 2**53) | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXT, inner, max_size=4),
    max_leaves=20,
)
_NAMES = ("messages", "input", "prompt", "documents", "stop", "user", "logit_bias")


@given(st.dictionaries(st.sampled_from(_NAMES), _VALUES, max_size=5))
def test_a_shape_holds_no_text_of_the_body(body: dict[str, Any]) -> None:
    shape = shape_of(body)
    assert not any(text in shape for text in texts_of(body))


def texts_of(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from texts_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts_of(inner)
