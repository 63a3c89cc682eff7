"""The names of a subject: in the columns, in the accounts of the limits, and when it is gone."""

from __future__ import annotations

import hmac
import secrets
from urllib.parse import quote, unquote

from serve_app.errors import InvalidRequest

MAX_CHARS = 255
# Of the service itself: it outlasts the master key, so old erasures are known after a rotation.
TAG_KEY = "erasures"
_PSEUDONYM_START = "erased-"


def fit(subject: str) -> str:
    """Return `subject` as the columns of a principal keep it: see the writer of records."""
    return subject.replace("\x00", "\N{REPLACEMENT CHARACTER}")[:MAX_CHARS]


def checked(subject: str) -> str:
    """Return `subject`. Raises InvalidRequest where no principal has such a name."""
    if not 0 < len(subject) <= MAX_CHARS or not subject.isprintable():
        message = f"A subject is a text of 1 to {MAX_CHARS} printable characters."
        raise InvalidRequest(message, param="subject")
    return subject


def tag_of(key: bytes, subject: str) -> bytes:
    """Return what stands for `subject` (32 bytes) where its name must not stand."""
    return hmac.digest(key, fit(subject).encode("utf-8", "replace"), "sha256")


def new_pseudonym() -> str:
    """Return a name that tells nothing of who had it."""
    return _PSEUDONYM_START + secrets.token_hex(16)


def in_accounts(subject: str) -> str:
    """Return `subject` as an account of the limits writes it: see serve_app/limits/scopes.py."""
    return quote(subject, safe="/", errors="surrogatepass")


def of_account(account: str) -> str:
    """Return the subject that an account of one principal or member names."""
    return unquote(account.rpartition(":")[2], errors="surrogatepass")
