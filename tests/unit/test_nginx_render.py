"""Rendering of the nginx template; what it does is in tests/integration/test_nginx.py."""

from __future__ import annotations

import re

import pytest

from serve_app.errors import ConfigError
from serve_app.stack.nginx import DEFAULTS, TEMPLATE, render, values_from


def test_the_table_at_the_top_names_each_variable_with_its_default() -> None:
    text = TEMPLATE.read_text()
    table = dict(re.findall(r"^#   (COMP_AI_NGINX_\w+) +(\S+)  +\S", text, re.MULTILINE))
    assert table == dict(DEFAULTS)
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    assert set(re.findall(r"\$\{(\w+)\}", code)) == set(DEFAULTS)


def test_values_win_over_defaults_and_nginx_variables_stay() -> None:
    text = render(
        "rate ${COMP_AI_NGINX_RATE} $host ${COMP_AI_NGINX_BURST}", {"COMP_AI_NGINX_RATE": "1r/s"}
    )
    assert text == f"rate 1r/s $host {DEFAULTS['COMP_AI_NGINX_BURST']}\n"


@pytest.mark.parametrize("value", ["", "a b", "a;b", "{", "$host", "a\nb", "'", "\\"])
def test_a_value_cannot_break_out_of_its_place(value: str) -> None:
    with pytest.raises(ConfigError, match="COMP_AI_NGINX_SERVER"):
        render("${COMP_AI_NGINX_SERVER}", {"COMP_AI_NGINX_SERVER": value})


def test_an_unknown_variable_is_refused() -> None:
    with pytest.raises(ConfigError, match="OTHER"):
        render("${OTHER}", {})


def test_the_environment_sets_only_what_it_names() -> None:
    environ = {"COMP_AI_NGINX_BURST": "5", "COMP_AI_NGINX_RATE": "", "PATH": "/bin"}
    assert values_from(environ) == {"COMP_AI_NGINX_BURST": "5"}
