"""A certificate that stands in until an authority has given a true one.

nginx does not start with TLS without any, and the authority asks nginx before it gives one.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from serve_app.records import utc_now
from serve_app.stack.home import write_secret

_VALID = timedelta(days=7)


def make_missing(certificate: Path, key: Path, host: str) -> bool:
    """Write a self-signed certificate for `host` and its key where there is none yet.

    Returns whether it did.
    """
    if certificate.exists() and key.exists():
        return False
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
    now = utc_now()
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + _VALID)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .sign(private, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    written = private.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_secret(key, written.decode("ascii"))
    certificate.write_bytes(made.public_bytes(pem))
    return True
