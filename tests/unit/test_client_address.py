"""Where a request comes from, as far as it can be believed."""

from __future__ import annotations

import pytest
from starlette.requests import Request

from serve_app.client_address import client_address


def request(
    *headers: tuple[str, str], client: tuple[str, int] | None = ("127.0.0.1", 1)
) -> Request:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    return Request({"type": "http", "headers": raw, "client": client})


@pytest.mark.parametrize("told", ["192.0.2.7", "2001:db8::7"])
def test_nginx_says_who_asks(told: str) -> None:
    assert client_address(request(("x-real-ip", told))) == told


@pytest.mark.parametrize("told", ["", "localhost", "192.0.2.7, 6.6.6.6", "x" * 100_000, "1.2.3"])
def test_what_is_no_address_counts_for_nothing(told: str) -> None:
    assert client_address(request(("x-real-ip", told))) == "127.0.0.1"


@pytest.mark.parametrize("name", ["x-forwarded-for", "forwarded", "x_real_ip", "true-client-ip"])
def test_no_other_header_counts(name: str) -> None:
    assert client_address(request((name, "6.6.6.6"))) == "127.0.0.1"


def test_nobody_knows() -> None:
    assert client_address(request(client=None)) is None
