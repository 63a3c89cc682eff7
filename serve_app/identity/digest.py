"""What is kept of a credential in its place."""

from __future__ import annotations

import hashlib


def digest_of(credential: str) -> bytes:
    """Return the SHA-256 (32 bytes) of a whole API key or token."""
    return hashlib.sha256(credential.encode("utf-8", "surrogateescape")).digest()
