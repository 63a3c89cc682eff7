"""The Authorization header, and who checks what it holds."""

from __future__ import annotations

import httpx
import pytest

from serve_app.errors import AuthenticationFailed, IdentityUnavailable
from serve_app.identity.api_keys import generate_key
from serve_app.identity.authenticator import build_authenticator, read_bearer
from serve_app.identity.principal import Permission
from serve_app.settings import load_settings

BOOTSTRAP = "0123456789abcdef0123456789abcdef"
# Port 9 (discard) of the loopback address: nobody listens.
AWAY = {"POSTGRES_HOST": "127.0.0.1", "POSTGRES_PORT": "9", "COMP_AI_API_KEY": BOOTSTRAP}


@pytest.mark.parametrize("header", [None, "", "  "])
def test_missing_header(header: str | None) -> None:
    with pytest.raises(AuthenticationFailed, match="is missing"):
        read_bearer(header)


@pytest.mark.parametrize("header", ["Basic YTpi", "token abc", "cai-abc", "Bearerabc"])
def test_other_scheme(header: str) -> None:
    with pytest.raises(AuthenticationFailed, match="another scheme"):
        read_bearer(header)


@pytest.mark.parametrize("header", ["Bearer", "Bearer ", "Bearer a b", "Bearer a\tb"])
def test_no_single_credential(header: str) -> None:
    with pytest.raises(AuthenticationFailed, match="no single credential"):
        read_bearer(header)


def test_huge_header() -> None:
    with pytest.raises(AuthenticationFailed, match="too long"):
        read_bearer("Bearer " + "a" * 100_000)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "bEaReR"])
def test_scheme_in_any_case(scheme: str) -> None:
    assert read_bearer(f"{scheme}  abc ") == "abc"


async def test_bootstrap_key_works_with_everything_away() -> None:
    authenticator = build_authenticator(load_settings(AWAY))
    authenticator.start()
    principal = await authenticator.authenticate(f"Bearer {BOOTSTRAP}")
    assert (principal.id, principal.permissions) == ("bootstrap", {Permission.ADMIN})
    with pytest.raises(IdentityUnavailable):
        await authenticator.authenticate(f"Bearer {generate_key()[0]}")
    await authenticator.close()


async def test_without_an_issuer_only_keys_are_taken() -> None:
    authenticator = build_authenticator(load_settings(AWAY))
    with pytest.raises(AuthenticationFailed, match="API keys only"):
        await authenticator.authenticate(f"Bearer {BOOTSTRAP}x")
    await authenticator.close()


async def test_wrong_key_is_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(0)
    issuer = {"COMP_AI_OIDC_ISSUER": "http://127.0.0.1:9/realm"}
    authenticator = build_authenticator(load_settings(AWAY | issuer))
    authenticator.start()
    credentials = [generate_key()[0], "cai-short-secret", "eyJhbGciOi.secret.secret"]
    for credential in credentials:
        with pytest.raises((AuthenticationFailed, IdentityUnavailable)) as refusal:
            await authenticator.authenticate(f"Bearer {credential}")
        assert credential not in repr(refusal.value) + caplog.text
    await authenticator.close()


async def test_tokens_go_to_the_issuer_that_is_away() -> None:
    http = httpx.AsyncClient(transport=httpx.MockTransport(lambda _: httpx.Response(503)))
    settings = load_settings(AWAY | {"COMP_AI_OIDC_ISSUER": "http://issuer.test"})
    authenticator = build_authenticator(settings, http=http)
    authenticator.start()
    # {"alg":"ES256","typ":"JWT","kid":"k"}.{"iss":"http://issuer.test"}.""
    token = (
        "eyJhbGciOiJFUzI1NiIsInR5cCI6IkpXVCIsImtpZCI6ImsifQ.eyJpc3MiOiJodHRwOi8vaXNzdWVyLnRlc3QifQ."
    )
    with pytest.raises(IdentityUnavailable):
        await authenticator.authenticate(f"Bearer {token}")
    await authenticator.close()
    assert http.is_closed
