"""Policy as an operator writes it: what is taken, and what a mistake is told."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from serve_app.config import (
    Bodies,
    Caps,
    Durability,
    GatewayConfig,
    LimitPolicy,
    ModelEntry,
    parse_config,
)
from serve_app.errors import ConfigError

MODEL = {"name": "small", "app": "model-small"}


def parse(**more: Any) -> GatewayConfig:
    return parse_config(GatewayConfig, {"models": [MODEL], **more}, "user_config")


def test_defaults_are_the_safe_ones() -> None:
    config = parse()
    assert config.durability is Durability.SYNC
    assert config.bodies.default is Bodies.FULL
    assert config.limits.policy_of("anybody") == LimitPolicy()


def test_model_is_found_by_its_name() -> None:
    config = parse()
    assert config.model("small") is config.models[0]
    assert config.model("model-small") is None


def test_entry_of_a_principal_wins() -> None:
    limits = {
        "default": {"requests_per_minute": 10, "concurrency": 2},
        "principals": {"batch": {"concurrency": 50}},
    }
    config = parse(limits=limits)
    assert config.limits.policy_of("u").requests_per_minute == 10
    assert config.limits.policy_of("batch") == LimitPolicy(concurrency=50)


def test_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        parse().deadline_s = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("raw", "setting", "value"),
    [
        ({"models": []}, "user_config.models", []),
        ({"deadline_s": 0}, "user_config.deadline_s", 0),
        ({"deadline": 5}, "user_config.deadline", 5),
        ({"durability": "maybe"}, "user_config.durability", "maybe"),
        ({"models": [{**MODEL, "name": "a b"}]}, "user_config.models.0.name", "a b"),
        ({"models": [{**MODEL, "max_tokens": 0}]}, "user_config.models.0.max_tokens", 0),
        (
            {"limits": {"principals": {"u": {"concurrency": -1}}}},
            "user_config.limits.principals.u.concurrency",
            -1,
        ),
    ],
)
def test_mistake_is_named_with_its_place_and_value(
    raw: dict[str, Any], setting: str, value: object
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(**raw)
    error = caught.value
    assert (error.setting, error.value) == (setting, value)
    assert error.allowed
    assert str(error).startswith(f"{setting} is {value!r}; allowed: ")


@pytest.mark.parametrize("raw", [None, [], "text", {}])
def test_config_that_is_none(raw: object) -> None:
    with pytest.raises(ConfigError, match=r"^user_config"):
        parse_config(GatewayConfig, raw, "user_config")


@pytest.mark.parametrize(
    ("models", "setting", "value"),
    [
        ([MODEL, {**MODEL, "app": "other"}], "models.1.name", "small"),
        ([{**MODEL, "aliases": ["small"]}], "models.0.aliases", "small"),
        ([{**MODEL, "aliases": ["a", "a"]}], "models.0.aliases", "a"),
        (
            [{**MODEL, "aliases": ["a"]}, {"name": "b", "app": "b", "aliases": ["c", "a"]}],
            "models.1.aliases",
            "a",
        ),
        ([{**MODEL, "aliases": ["b"]}, {"name": "b", "app": "b"}], "models.1.name", "b"),
    ],
)
def test_a_name_leads_to_one_model(models: list[dict[str, Any]], setting: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(models=models)
    assert (caught.value.setting, caught.value.value) == (f"user_config.{setting}", value)


def test_the_default_model_is_one_on_offer() -> None:
    models = [{**MODEL, "aliases": ["a"]}]
    assert parse(models=models, default_model="a").default_model == "a"
    with pytest.raises(ConfigError) as caught:
        parse(models=models, default_model="b")
    assert (caught.value.setting, caught.value.value) == ("user_config.default_model", "b")


def test_every_field_says_what_it_is() -> None:
    for kind in (GatewayConfig, LimitPolicy, ModelEntry, Caps):
        assert all(field.description for field in kind.model_fields.values())
