"""Sign-ins that fail, by address."""

from __future__ import annotations

import logging

import pytest

from serve_app.errors import AuthenticationFailed, TooManyFailedSignIns
from serve_app.identity.principal import Permission, Principal
from serve_app.identity.sign_ins import CredentialKind, SignIns, kind_of, network_of
from serve_app.records import PrincipalKind

GOOD = "Bearer cai-good"
BAD = "Bearer cai-bad-secret"
HERE = "192.0.2.1"


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


class OneKey:
    """Knows one credential."""

    async def authenticate(self, authorization: str | None) -> Principal:
        if authorization != GOOD:
            raise AuthenticationFailed
        return Principal(
            id="ada", kind=PrincipalKind.API_KEY, permissions=frozenset({Permission.USER})
        )


class Counted:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.failures: list[tuple[CredentialKind, bool]] = []

    def sign_in_failed(self, kind: CredentialKind, *, limited: bool) -> None:
        self.failures.append((kind, limited))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def counted() -> Counted:
    return Counted()


@pytest.fixture
def sign_ins(clock: Clock, counted: Counted) -> SignIns:
    return SignIns(OneKey(), counted, addresses=3, clock=clock)


async def fails(
    sign_ins: SignIns,
    address: str | None = HERE,
    credential: str | None = BAD,
    per_minute: int | None = 3,
) -> float | None:
    """Fail once; return how long to wait where it was one too many."""
    with pytest.raises((AuthenticationFailed, TooManyFailedSignIns)) as refusal:
        await sign_ins.check(credential, address, per_minute)
    if isinstance(refusal.value, AuthenticationFailed):
        return None
    assert refusal.value.retry_after_s is not None
    return refusal.value.retry_after_s


async def test_too_many_failures_are_refused_until_there_is_room(
    sign_ins: SignIns, clock: Clock
) -> None:
    assert [await fails(sign_ins) for _ in range(3)] == [None] * 3
    wait_s = await fails(sign_ins)
    assert wait_s == pytest.approx(20)
    # Who goes on guessing does not make it longer.
    clock.time += 10
    assert await fails(sign_ins) == pytest.approx(10)
    clock.time += 10.01
    assert await fails(sign_ins) is None
    assert await fails(sign_ins) is not None
    clock.time += 60
    assert [await fails(sign_ins) for _ in range(3)] == [None] * 3


async def test_a_good_credential_passes_all_the_same(sign_ins: SignIns) -> None:
    while await fails(sign_ins) is None:
        pass
    assert (await sign_ins.check(GOOD, HERE, 3)).id == "ada"
    assert await fails(sign_ins) is not None


async def test_each_address_has_its_own(sign_ins: SignIns) -> None:
    while await fails(sign_ins) is None:
        pass
    assert await fails(sign_ins, "192.0.2.2") is None
    assert await fails(sign_ins, None) is None


async def test_who_sends_nothing_guesses_nothing(sign_ins: SignIns, counted: Counted) -> None:
    for nothing in (None, " "):
        for _ in range(5):
            assert await fails(sign_ins, credential=nothing) is None
    assert set(counted.failures) == {(CredentialKind.NONE, False)}


async def test_without_a_limit_none_holds(sign_ins: SignIns) -> None:
    for _ in range(100):
        assert await fails(sign_ins, per_minute=None) is None


async def test_memory_is_bounded_and_the_least_recent_address_goes(sign_ins: SignIns) -> None:
    for last in (1, 2, 3, 4):
        for _ in range(4):
            await fails(sign_ins, f"192.0.2.{last}")
    assert await fails(sign_ins, "192.0.2.4") is not None
    assert await fails(sign_ins, "192.0.2.1") is None


async def test_guessing_is_counted_and_told_once_a_minute(
    sign_ins: SignIns, counted: Counted, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    for _ in range(10):
        await fails(sign_ins)
    await fails(sign_ins, credential="Bearer eyJhbGciOi.x.y")
    assert counted.failures.count((CredentialKind.API_KEY, False)) == 3
    assert counted.failures.count((CredentialKind.API_KEY, True)) == 7
    assert counted.failures.count((CredentialKind.TOKEN, True)) == 1
    [told] = caplog.records
    assert told.levelno == logging.WARNING
    assert (told.action, told.client_address, told.credential) == (  # type: ignore[attr-defined]
        "sign_ins_limited",
        HERE,
        "api_key",
    )
    assert "bad-secret" not in str(vars(told))
    clock.time += 60
    for _ in range(4):
        await fails(sign_ins)
    assert len(caplog.records) == 2


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::9", "2001:db8:1:3::/64"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("fe80::1%eth0", "fe80::/64"),
        (None, "unknown"),
        ("", "unknown"),
        ("x" * 10_000, "unknown"),
    ],
)
def test_what_failures_are_counted_for(address: str | None, network: str) -> None:
    assert network_of(address) == network


@pytest.mark.parametrize(
    ("header", "kind"),
    [
        (None, CredentialKind.NONE),
        ("", CredentialKind.NONE),
        ("Bearer cai-x", CredentialKind.API_KEY),
        ("bearer   cai-x", CredentialKind.API_KEY),
        ("Bearer eyJ.a.b", CredentialKind.TOKEN),
        ("Basic YTpi", CredentialKind.TOKEN),
    ],
)
def test_kinds_of_credentials(header: str | None, kind: CredentialKind) -> None:
    assert kind_of(header) == kind
