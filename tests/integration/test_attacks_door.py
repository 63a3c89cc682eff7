"""Attacks on the door: what a request smuggles past nginx must not change who asks.

The rows about tokens are in test_attacks.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from tests.integration.doors import door
from tests.integration.fakes import KEY, World, principal, until, world

ADMIN_KEY = "key-of-an-admin"


@pytest.fixture
async def served() -> AsyncIterator[World]:
    async with world() as made:
        made.authenticator.principals[ADMIN_KEY] = principal("admin-1")
        yield made


async def send(port: int, request: bytes) -> list[tuple[int, bytes]]:
    """Send `request` as it stands; return status and body of each answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(20):
            writer.write(request)
            received = await reader.read()
    finally:
        writer.close()
    answers = []
    for part in received.split(b"HTTP/1.1 ")[1:]:
        head, _, body = part.partition(b"\r\n\r\n")
        answers.append((int(head[:3]), body))
    return answers


def get(*headers: str, path: str = "/v1/models") -> bytes:
    lines = [f"GET {path} HTTP/1.1", "Host: x", "Connection: close", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1")


BEARER = f"Authorization: Bearer {KEY}"
# Who asks by these headers alone is nobody.
FORGED_IDENTITY = [
    "X-Forwarded-User: admin-1",
    "X-Forwarded-Preferred-Username: admin-1",
    "X-Forwarded-Email: admin@example.com",
    "X-Forwarded-Groups: admins",
    f"X-Forwarded-Access-Token: {ADMIN_KEY}",
    "X-Auth-Request-User: admin-1",
    "X-Auth-Request-Groups: admins",
    f"X-Auth-Request-Access-Token: {ADMIN_KEY}",
    "X-Remote-User: admin-1",
    "X-Comp-AI-Principal: admin-1",
    "X-Comp-AI-Permissions: comp-ai:admin",
    f"X-Comp-AI-Authorization: Bearer {ADMIN_KEY}",
    f"X-Api-Key: {ADMIN_KEY}",
    f"Proxy-Authorization: Bearer {ADMIN_KEY}",
    f"X-Original-Authorization: Bearer {ADMIN_KEY}",
    f"Cookie: authorization=Bearer {ADMIN_KEY}",
    # As CGI names them: a header with underscores must not pass for one with hyphens.
    f"X_Authorization: Bearer {ADMIN_KEY}",
    f"HTTP_AUTHORIZATION: Bearer {ADMIN_KEY}",
    f"Authorization : Bearer {ADMIN_KEY}",
    f"Authorization\x0b: Bearer {ADMIN_KEY}",
    # Folded into the value of the line before (RFC 9112, 5.2).
    f"X-Folded: a\r\n Authorization: Bearer {ADMIN_KEY}",
    f"X-Folded: a\r\n\tAuthorization: Bearer {ADMIN_KEY}",
    f"X-Bare-LF: a\nX-Real-IP: 1.2.3.4\nX_Authorization: Bearer {ADMIN_KEY}",
]


@pytest.mark.parametrize("header", FORGED_IDENTITY)
async def test_no_header_but_authorization_says_who_asks(served: World, header: str) -> None:
    with door(served) as port:
        [(status, body)] = await send(port, get(header))
    assert status in (400, 401)
    assert json.loads(body)["error"]["code"] in ("invalid_value", "invalid_api_key")
    # Nor does it change who asks beside a good credential.
    with door(served) as port:
        await send(port, get(BEARER, header))
    assert {record.principal_id for record in served.records} <= {None, "user-1"}


@pytest.mark.parametrize(
    "headers",
    [
        (BEARER, f"Authorization: Bearer {ADMIN_KEY}"),
        (f"Authorization: Bearer {ADMIN_KEY}", BEARER),
        ("Authorization: Basic YTpi", BEARER),
        (BEARER, BEARER.lower()),
        (f"{BEARER}, Bearer {ADMIN_KEY}",),
        (f"{BEARER}\r\n , Bearer {ADMIN_KEY}",),
        ("Authorization: Bearer", f"authorization:\t{KEY}"),
    ],
)
async def test_of_two_credentials_none_counts(served: World, headers: tuple[str, ...]) -> None:
    with door(served) as port:
        [(status, _)] = await send(port, get(*headers))
    assert status in (400, 401)
    assert {record.principal_id for record in served.records} <= {None}


@pytest.mark.parametrize(
    "name",
    ["X-Real-IP", "X-Forwarded-For", "Forwarded", "X_Real_IP", "X-Client-IP", "True-Client-IP"],
)
async def test_a_client_cannot_choose_the_address_in_its_record(served: World, name: str) -> None:
    value = "for=6.6.6.6" if name == "Forwarded" else "6.6.6.6"
    with door(served) as port:
        [(status, _)] = await send(port, get(BEARER, f"{name}: {value}", f"{name}: {value}"))
    assert status == 200
    await until(lambda: len(served.records) == 1)
    assert served.records[0].client_address == "127.0.0.1"


# What would be a second request, were the two ends of different minds about where the first ends.
_SMUGGLED = get(BEARER, "X-Request-ID: smuggled").replace(b"Connection: close\r\n", b"")
_LENGTH = len(_SMUGGLED)


def post(*headers: str, body: bytes) -> bytes:
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: x", BEARER, *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


@pytest.mark.parametrize(
    "request_bytes",
    [
        pytest.param(
            post(
                f"Content-Length: {5 + _LENGTH}",
                "Transfer-Encoding: chunked",
                body=b"0\r\n\r\n" + _SMUGGLED,
            ),
            id="CL.TE",
        ),
        pytest.param(
            post("Transfer-Encoding: chunked", "Content-Length: 4", body=b"0\r\n\r\n" + _SMUGGLED),
            id="TE.CL",
        ),
        pytest.param(
            post(
                "Transfer-Encoding: xchunked",
                f"Content-Length: {_LENGTH}",
                body=_SMUGGLED,
            ),
            id="a transfer that nobody knows",
        ),
        pytest.param(
            post("Transfer-Encoding: chunked", "Transfer-Encoding: x", body=b"0\r\n\r\n"),
            id="TE.TE",
        ),
        pytest.param(
            post("Transfer-Encoding : chunked", "Content-Length: 5", body=b"0\r\n\r\n" + _SMUGGLED),
            id="a space before the colon",
        ),
        pytest.param(
            post("Content-Length: 0", f"Content-Length: {_LENGTH}", body=_SMUGGLED), id="CL.CL"
        ),
        pytest.param(post(f"Content-Length: +{_LENGTH}", body=_SMUGGLED), id="a signed length"),
        pytest.param(post("Content-Length: 0x0", body=_SMUGGLED), id="a hexadecimal length"),
        pytest.param(
            post("Transfer-Encoding: chunked", body=b"0;\n\r\nX: 1\r\n\r\n"),
            id="a bare LF",
        ),
    ],
)
async def test_no_second_request_hides_in_a_first(served: World, request_bytes: bytes) -> None:
    with door(served) as port:
        answers = await send(port, request_bytes)
        # One that is seen, to know that the first was heard to its end.
        await send(port, get(BEARER, "X-Request-ID: last"))
    assert answers
    assert all(status >= 400 for status, _ in answers)
    await until(lambda: any(record.request_id == "last" for record in served.records))
    assert "smuggled" not in [record.request_id for record in served.records]


# Guessing.


async def test_guessing_is_slowed_down_and_shuts_nobody_out() -> None:
    async with world(sign_in={"failures_per_minute": 3}) as served:
        with door(served) as port:

            async def guess(*headers: str) -> tuple[int, str]:
                [(status, body)] = await send(port, get(*headers))
                return status, json.loads(body).get("error", {}).get("code", "")

            guesses = [await guess(f"Authorization: Bearer cai-{n}") for n in range(5)]
            assert (
                guesses == [(401, "invalid_api_key")] * 3 + [(429, "too_many_failed_sign_ins")] * 2
            )
            # Behind the same address somebody else has a good credential, or none at all.
            assert (await guess(BEARER))[0] == 200
            assert (await guess())[0] == 401
            # An address of one's own choice is no way around.
            for name in ("X-Real-IP", "X-Forwarded-For"):
                status, _ = await guess("Authorization: Bearer cai-x", f"{name}: 6.6.6.6")
                assert status == 429
        assert {record.client_address for record in served.records} == {"127.0.0.1"}


async def test_a_guess_at_an_address_that_is_not_there_counts_too() -> None:
    async with world(sign_in={"failures_per_minute": 1}) as limited:
        with door(limited) as port:
            wrong = "Authorization: Bearer cai-x"
            for path in ("/v1/nothing", "/v1/models"):
                [(status, _)] = await send(port, get(wrong, path=path))
            assert status == 429
