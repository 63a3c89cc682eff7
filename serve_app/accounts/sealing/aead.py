"""AES-256-GCM under keys that may seal any number of texts.

GCM with random nonces is safe for 2^32 texts of one key (NIST SP 800-38D, 8.3), and a busy
service writes more. So each `Sealer` derives a key of its own with a random salt, and counts its
nonces. A sealed text is  version (1 byte) ‖ salt (16) ‖ nonce (12) ‖ ciphertext ‖ tag (16).
"""

from __future__ import annotations

import itertools
import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from serve_app.errors import CompAIError

KEY_BYTES = 32
_VERSION = b"\x01"
_SALT_BYTES = 16
_NONCE_BYTES = 12
_SALT = slice(1, 1 + _SALT_BYTES)
_NONCE = slice(_SALT.stop, _SALT.stop + _NONCE_BYTES)
_REST = slice(_NONCE.stop, None)


class SealBroken(CompAIError):
    """A sealed text does not open: it was changed, or belongs to another row or another key."""


def derive(key: bytes, purpose: str, salt: bytes | None = None) -> bytes:
    """Return a key of 32 bytes that `key` gives for one purpose (HKDF-SHA-256, RFC 5869)."""
    hkdf = HKDF(
        algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=b"comp-ai " + purpose.encode()
    )
    return hkdf.derive(key)


class Sealer:
    """Seals and opens under one key. Threads may share it; forked processes may not."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._salt = os.urandom(_SALT_BYTES)
        self._aead = _aead(key, self._salt)
        self._opened = self._salt, self._aead
        # Each nonce once under the key that the salt gives.
        self._numbers = itertools.count()

    def seal(self, plain: bytes, place: bytes) -> bytes:
        """Return `plain` sealed; it opens only for the same `place`."""
        nonce = next(self._numbers).to_bytes(_NONCE_BYTES, "big")
        return _VERSION + self._salt + nonce + self._aead.encrypt(nonce, plain, place)

    def open(self, sealed: bytes, place: bytes) -> bytes:
        """Return what was sealed. Raises SealBroken."""
        if sealed[:1] != _VERSION or len(sealed) < _REST.start:
            raise SealBroken
        try:
            return self._opener(sealed[_SALT]).decrypt(sealed[_NONCE], sealed[_REST], place)
        except InvalidTag:
            raise SealBroken from None

    def _opener(self, salt: bytes) -> AESGCM:
        # What one process sealed has one salt, and mostly comes together.
        known, aead = self._opened
        if salt != known:
            aead = _aead(self._key, salt)
            self._opened = salt, aead
        return aead


def _aead(key: bytes, salt: bytes) -> AESGCM:
    return AESGCM(derive(key, "seal", salt))
