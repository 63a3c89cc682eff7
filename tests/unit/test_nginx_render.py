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
    assert set(re.findall(r"\$\{(\w+)(?::servers)?\}", code)) == set(DEFAULTS)


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


def test_what_is_off_is_not_there() -> None:
    text = render(TEMPLATE.read_text(), {})
    for absent in ("ssl_certificate", "stub_status", "resolver", "return 308", "#"):
        assert absent not in text
    assert "listen 127.0.0.1:8080 default_server;" in text


def test_what_is_on_is_there() -> None:
    values = {
        "COMP_AI_NGINX_STATUS": "8082",
        "COMP_AI_NGINX_RESOLVER": "127.0.0.11",
        "COMP_AI_NGINX_UPSTREAM": "a:1,10.0.0.1:2",
        "COMP_AI_NGINX_TLS_CERTIFICATE": "/tls/c.pem",
        "COMP_AI_NGINX_TLS_KEY": "/tls/k.pem",
    }
    text = render(TEMPLATE.read_text(), values)
    assert "listen 8082;" in text
    assert "stub_status;" in text
    assert "server a:1 max_fails=1 fail_timeout=5s resolve;" in text
    assert "server 10.0.0.1:2 max_fails=1 fail_timeout=5s;" in text
    assert "listen 127.0.0.1:8080 default_server ssl;" in text
    assert "listen 127.0.0.1:8080 default_server;" not in text


@pytest.mark.parametrize("value", ["a", "a:b", "a:1,", ",", "a:1,,b:2", "a:123456", "http://a:1"])
def test_an_upstream_must_be_an_address(value: str) -> None:
    with pytest.raises(ConfigError, match="COMP_AI_NGINX_UPSTREAM"):
        render("${COMP_AI_NGINX_UPSTREAM:servers}", {"COMP_AI_NGINX_UPSTREAM": value})


def test_a_choice_of_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="OTHER"):
        render("#? OTHER\nx\n#?", {})
