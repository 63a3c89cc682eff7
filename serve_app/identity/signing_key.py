"""The key with which the local issuer signs: ES256 (RFC 7518 §3.4), made once, kept in a file."""

from __future__ import annotations

import base64
import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import jwt
import orjson
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from serve_app.errors import ConfigError
from serve_app.files import write_whole

ALGORITHM = "ES256"
_COORDINATE_BYTES = 32
_FILE_NAME = "signing-key.pem"


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A P-256 key pair; its `kid` is its RFC 7638 thumbprint."""

    private: ec.EllipticCurvePrivateKey = field(repr=False)
    kid: str

    @classmethod
    def generate(cls) -> Self:
        """Make a new key."""
        return cls._of(ec.generate_private_key(ec.SECP256R1()))

    @classmethod
    def load_or_create(cls, folder: Path) -> Self:
        """Return the key of `folder`, made at the first call; readable by its owner only.

        Raises:
            ConfigError: the file is not such a key.
        """
        path = folder / _FILE_NAME
        if not path.exists():
            create_private_file(path, cls.generate()._to_pem())
        try:
            private = serialization.load_pem_private_key(path.read_bytes(), password=None)
        except ValueError:
            raise ConfigError("signing key", str(path), "a P-256 private key in PEM") from None
        if not isinstance(private, ec.EllipticCurvePrivateKey):
            raise ConfigError("signing key", str(path), "a P-256 private key in PEM")
        return cls._of(private)

    @classmethod
    def _of(cls, private: ec.EllipticCurvePrivateKey) -> Self:
        # RFC 7638 §3: the required members in order, without spaces.
        canonical = orjson.dumps(_numbers(private), option=orjson.OPT_SORT_KEYS)
        return cls(private, _base64url(hashlib.sha256(canonical).digest()))

    def sign(self, claims: Mapping[str, Any]) -> str:
        """Return `claims` as a signed JWT with header `typ` JWT, as Keycloak's are."""
        return jwt.encode(
            dict(claims), self.private, algorithm=ALGORITHM, headers={"kid": self.kid}
        )

    def to_jwk(self) -> dict[str, str]:
        """Return the public half as a JWK (RFC 7517)."""
        return {**_numbers(self.private), "kid": self.kid, "use": "sig", "alg": ALGORITHM}

    def _to_pem(self) -> bytes:
        return self.private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )


def create_private_file(path: Path, content: bytes) -> None:
    """Write a file that only its owner reads, whole or not at all; an existing one stays."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        write_whole(path, content, overwrite=False)


def _numbers(private: ec.EllipticCurvePrivateKey) -> dict[str, str]:
    numbers = private.public_key().public_numbers()
    return {
        "crv": "P-256",
        "kty": "EC",
        "x": _base64url(numbers.x.to_bytes(_COORDINATE_BYTES, "big")),
        "y": _base64url(numbers.y.to_bytes(_COORDINATE_BYTES, "big")),
    }


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")
