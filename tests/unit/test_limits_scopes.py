"""Whose limits a request takes from, and what it reserves."""

from __future__ import annotations

import uuid
from typing import Any

import orjson
import pytest

from serve_app.completions.body import Defaults, Rules, govern
from serve_app.completions.kinds import Kind
from serve_app.completions.most import most_tokens
from serve_app.completions.sse import Usage
from serve_app.config import (
    Caps,
    GatewayConfig,
    LimitPolicy,
    LimitsConfig,
    ModelEntry,
    Standing,
    parse_config,
)
from serve_app.errors import ConfigError
from serve_app.identity.principal import Permission, Principal
from serve_app.limits.scopes import scopes_of
from serve_app.records import PrincipalKind

KEY_ID = uuid.UUID(int=7)


def principal(principal_id: str = "ada", **more: Any) -> Principal:
    fields = {"kind": PrincipalKind.USER, "permissions": frozenset({Permission.USER})}
    return Principal(id=principal_id, **{**fields, **more})


def config(**limits: Any) -> LimitsConfig:
    return LimitsConfig.model_validate(limits)


def test_every_scope_that_applies_is_named() -> None:
    policy = config(
        currency="EUR",
        everyone={"tokens_per_minute": 1000},
        default={"cost_per_day": 0.1},
        groups={
            "lab/one": {"members": "together", "concurrency": 3},
            "other": {"members": "together", "concurrency": 1},
        },
        roles={"trial": {"members": "each", "requests_per_minute": 5}},
    )
    who = principal(
        api_key_id=KEY_ID,
        limits=LimitPolicy(tokens_per_day=10),
        groups=frozenset({"lab/one"}),
        roles=frozenset({"trial"}),
    )
    everyone, own, key, group, role = scopes_of(who, policy)
    assert (everyone.key, everyone.tokens_per_minute) == ("everyone", 1000)
    assert (own.key, own.label, own.cost_per_day) == ("principal:ada", "you", 100_000)
    assert (key.key, key.label, key.tokens_per_day) == (f"api_key:{KEY_ID}", "your API key", 10)
    assert (group.key, group.label, group.concurrency) == (
        "group:lab/one",
        "the group `lab/one`",
        3,
    )
    assert (role.key, role.label, role.requests_per_minute) == (
        "role-member:trial:ada",
        "each of the role `trial`",
        5,
    )


def test_names_cannot_be_made_to_share_an_account() -> None:
    policy = config(
        roles={
            "a": {"members": "each", "concurrency": 1},
            "a:b": {"members": "each", "concurrency": 1},
        }
    )
    first = scopes_of(principal("b:c", roles=frozenset({"a"})), policy)
    second = scopes_of(principal("c", roles=frozenset({"a:b"})), policy)
    assert first[-1].key != second[-1].key


def test_key_of_a_name_is_plain_text() -> None:
    _, own = scopes_of(principal("a\x00\ud800ü"), config())
    assert own.key.isascii()
    assert own.key.isprintable()


@pytest.mark.parametrize(
    ("raw", "setting"),
    [
        ({"limits": {"everyone": {"cost_per_day": 1}}}, "limits.currency"),
        (
            {"models": [{"name": "m", "app": "a", "price_per_million_prompt_tokens": 1}]},
            "limits.currency",
        ),
        ({"limits": {"groups": {"g": {"concurrency": 1}}}}, "limits.groups.g.members"),
        ({"limits": {"currency": "euro"}}, "limits.currency"),
        (
            {"limits": {"currency": "EUR", "default": {"cost_per_day": 0.0000001}}},
            "limits.default.cost_per_day",
        ),
    ],
)
def test_wrong_limits_are_named(raw: dict[str, Any], setting: str) -> None:
    raw = {"models": [{"name": "m", "app": "a"}], **raw}
    with pytest.raises(ConfigError) as caught:
        parse_config(GatewayConfig, raw, "user_config")
    assert caught.value.setting == f"user_config.{setting}"


# What a request reserves.

DEFAULTS = Defaults(max_tokens=4096, temperature=0.7)


def most(kind: Kind, body: dict[str, Any], **model: Any) -> Usage:
    entry = ModelEntry.model_validate({"name": "m", "app": "m", **model})
    rules = Rules(defaults=DEFAULTS, caps=Caps(), standing=Standing(), remote_media=True)
    return most_tokens(govern(kind, {"model": "m", **body}, entry, rules))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"max_tokens": 10}, 10),
        ({"max_tokens": 10, "n": 3}, 30),
        ({"max_tokens": 10, "max_completion_tokens": 20}, 20),
        ({}, 4096),
    ],
)
def test_completion_of_a_chat(body: dict[str, Any], expected: int) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    assert most(Kind.CHAT, {"messages": messages, **body}).completion_tokens == expected


def test_every_prompt_of_a_text_has_its_answers() -> None:
    body = {"prompt": ["a", "b"], "n": 2, "max_tokens": 5}
    assert most(Kind.TEXT, body).completion_tokens == 20


@pytest.mark.parametrize("text", ["word " * 50, "ü" * 100, "🦜" * 30, "\x01" * 40])
def test_prompt_is_bounded_by_its_bytes(text: str) -> None:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 1}
    bound = most(Kind.CHAT, body, template_tokens=100).prompt_tokens
    assert bound >= len(text.encode()) + 100


def test_token_ids_are_fewer_than_their_bytes() -> None:
    assert most(Kind.TEXT, {"prompt": [1] * 500, "max_tokens": 1}).prompt_tokens >= 500


def test_context_bounds_prompt_and_answer() -> None:
    body = {"messages": [{"role": "user", "content": "x" * 5000}], "max_tokens": 4000, "n": 2}
    assert most(Kind.CHAT, body, context_tokens=1000) == Usage(1000, 2 * 999)


def test_picture_takes_the_context() -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    body = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 1}
    assert most(Kind.CHAT, body, context_tokens=1000).prompt_tokens == 1000
    assert most(Kind.CHAT, body).prompt_tokens == 131_072


def test_text_that_speaks_of_a_picture_is_text() -> None:
    said = orjson.dumps({"type": "image_url"}).decode()
    body = {"messages": [{"role": "user", "content": said}], "max_tokens": 1}
    assert most(Kind.CHAT, body).prompt_tokens < 1000


def test_query_counts_with_each_document() -> None:
    query, documents = "q" * 1000, ["a", "b", "c"]
    alone = most(Kind.RERANK, {"query": query, "documents": ["a"]}, task="score")
    assert alone.completion_tokens == 0
    three = most(Kind.RERANK, {"query": query, "documents": documents}, task="score")
    assert three.prompt_tokens >= alone.prompt_tokens + 2 * len(query)
    pairs = most(Kind.SCORE, {"text_1": query, "text_2": documents}, task="score")
    assert pairs.prompt_tokens >= 3 * len(query)


@pytest.mark.parametrize(
    ("kind", "body"), [(Kind.TOKENIZE, {"prompt": "x"}), (Kind.DETOKENIZE, {"tokens": [1]})]
)
def test_tokenizer_alone_reserves_nothing(kind: Kind, body: dict[str, Any]) -> None:
    assert most(kind, body) == Usage(0, 0)


def test_cost_is_rounded_up_and_exact() -> None:
    model = ModelEntry.model_validate(
        {
            "name": "m",
            "app": "m",
            "price_per_million_prompt_tokens": 0.15,
            "price_per_million_completion_tokens": "0.6",
        }
    )
    assert model.cost_micros(1_000_000, 1_000_000) == 750_000
    assert model.cost_micros(1, 0) == 1
    assert model.cost_micros(20, 0) == 3
    assert model.cost_micros(0, 0) == 0
