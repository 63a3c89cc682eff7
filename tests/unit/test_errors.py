"""The tree of errors: what each one tells a client, and that it survives a process border."""

from __future__ import annotations

import inspect
import pickle

import pytest

from serve_app import errors
from serve_app.errors import (
    CompAIError,
    ConfigError,
    RateLimited,
    RequestError,
    every_error,
    to_openai,
)

# RequestError itself is never raised.
KINDS = list(every_error())


@pytest.mark.parametrize("kind", KINDS)
def test_kind_has_status_code_and_its_docstring_as_message(kind: type[RequestError]) -> None:
    error = kind()
    assert 400 <= error.status <= 599
    assert error.code
    # OpenAI has one type that is its code.
    assert error.type.endswith("_error") or error.type == error.code == "insufficient_quota"
    assert error.message == str(error) == inspect.cleandoc(kind.__dict__["__doc__"])
    assert error.message.endswith(".")


@pytest.mark.parametrize("kind", KINDS)
def test_kind_says_why_it_comes_and_what_helps(kind: type[RequestError]) -> None:
    # Its own words: those of its family would not tell it from the others.
    for name in ("cause", "remedy"):
        words = kind.__dict__[name]
        assert words
        assert not words.endswith(".")
        assert "|" not in words


def test_codes_tell_kinds_apart() -> None:
    codes = [kind.code for kind in KINDS]
    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize("kind", KINDS)
def test_tree_at_the_top_of_the_module_names_the_kind(kind: type[RequestError]) -> None:
    tree = inspect.cleandoc(errors.__doc__ or "").splitlines()
    (line,) = [line for line in tree if kind.__name__ in line.split()]
    numbers = [word for word in line.split() if word.isdigit()]
    assert numbers in ([], [str(kind.status)])


@pytest.mark.parametrize("kind", KINDS)
def test_pickling_keeps_everything(kind: type[RequestError]) -> None:
    error = pickle.loads(pickle.dumps(kind("why", param="n", retry_after_s=2.5)))
    assert type(error) is kind
    assert (error.message, error.param, error.retry_after_s) == ("why", "n", 2.5)
    assert str(error) == "why"


def test_pickling_keeps_the_default_message() -> None:
    assert pickle.loads(pickle.dumps(RateLimited())).message == RateLimited().message


def test_openai_form() -> None:
    assert to_openai(RateLimited("Too many.", param="n")) == {
        "error": {
            "message": "Too many.",
            "type": "rate_limit_error",
            "param": "n",
            "code": "rate_limit_exceeded",
        }
    }


def test_config_error_names_setting_value_and_what_is_allowed() -> None:
    error = ConfigError("COMP_AI_PORT", "x", "a number")
    assert isinstance(error, CompAIError)
    assert str(error) == "COMP_AI_PORT is 'x'; allowed: a number"


def test_config_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ConfigError("COMP_AI_PORT", "x", "a number")))
    assert (error.setting, error.value, error.allowed) == ("COMP_AI_PORT", "x", "a number")
