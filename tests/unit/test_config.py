"""Policy as an operator writes it: what is taken, and what a mistake is told."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from serve_app.config import Bodies, Durability, GatewayConfig, LimitPolicy, parse_config
from serve_app.errors import ConfigError

MODEL = {"name": "small", "app": "model-small"}


def parse(**more: Any) -> GatewayConfig:
    return parse_config(GatewayConfig, {"models": [MODEL], **more}, "user_config")


def test_defaults_are_the_safe_ones() -> None:
    config = parse()
    assert config.durability is Durability.SYNC
    assert config.bodies is Bodies.FULL
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


def test_names_of_models_differ() -> None:
    with pytest.raises(ConfigError, match="must differ"):
        parse(models=[MODEL, {**MODEL, "app": "other"}])


def test_every_field_says_what_it_is() -> None:
    for kind in (GatewayConfig, LimitPolicy):
        assert all(field.description for field in kind.model_fields.values())
