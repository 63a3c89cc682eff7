"""TLS to PostgreSQL: the right CA and name pass, another CA or another name does not."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from serve_app.database import DatabaseUnavailable, connect, create_pool
from serve_app.errors import ConfigError
from serve_app.records import utc_now
from serve_app.settings import PostgresSettings, load_settings


@dataclass(frozen=True)
class Signed:
    """A key and its certificate."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    def write(self, folder: Path, name: str) -> Path:
        """Write both below `folder`; return the file of the certificate."""
        key = self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        (folder / f"{name}.key").write_bytes(key)
        (folder / f"{name}.key").chmod(0o600)
        file = folder / f"{name}.crt"
        file.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))
        return file


def signed(name: str, by: Signed | None = None) -> Signed:
    """Return a CA, or a certificate of the address `name` that it signed."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(by.certificate.subject if by else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(utc_now() - timedelta(days=1))
        .not_valid_after(utc_now() + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=by is None, path_length=None), critical=True)
    )
    if by is not None:
        names = x509.SubjectAlternativeName([x509.IPAddress(ip_address(name))])
        builder = builder.add_extension(names, critical=False)
    return Signed(key, builder.sign(by.key if by else key, hashes.SHA256()))


# The certificate names the first of these loopback addresses.
NAMED, UNNAMED = "127.0.0.1", "127.0.0.2"


@dataclass(frozen=True)
class Served:
    """A PostgreSQL behind TLS, and files of CAs: its own, and another."""

    settings: PostgresSettings
    ca: Path
    other_ca: Path

    def by(self, host: str, sslmode: str, ca: Path) -> PostgresSettings:
        """Return how to reach it there, in that mode, trusting that CA."""
        changes = {"host": host, "sslmode": sslmode, "sslrootcert": ca}
        return self.settings.model_copy(update=changes)


@pytest.fixture
async def served(database: PostgresSettings, tmp_path: Path) -> AsyncIterator[Served]:
    """The server of the tests was built without TLS, so its side of it is spoken here."""
    ca = signed("the company")
    certificate = signed(NAMED, by=ca).write(tmp_path, "server")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, tmp_path / "server.key")

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            # https://www.postgresql.org/docs/current/protocol-message-formats.html: SSLRequest
            assert await reader.readexactly(8) == struct.pack("!II", 8, 80877103)
            writer.write(b"S")
            await writer.start_tls(context)
            far = await asyncio.open_unix_connection(f"{database.host}/.s.PGSQL.{database.port}")
            await asyncio.gather(_copy(reader, far[1]), _copy(far[0], writer))
        writer.close()

    server = await asyncio.start_server(relay, "0.0.0.0", 0)
    port = server.sockets[0].getsockname()[1]
    settings = database.model_copy(update={"port": port})
    yield Served(settings, ca.write(tmp_path, "ca"), signed("another").write(tmp_path, "other"))
    server.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


async def _answers(settings: PostgresSettings) -> bool:
    connection = await connect(settings, application_name="tests")
    answer = await connection.fetchval("select 1")
    await connection.close()
    return bool(answer == 1)


async def test_the_right_ca_and_name_pass(served: Served) -> None:
    assert await _answers(served.by(NAMED, "verify-full", served.ca))
    assert await _answers(served.by(NAMED, "verify-ca", served.ca))
    pool = await create_pool(
        served.by(NAMED, "verify-full", served.ca),
        min_size=1,
        max_size=1,
        application_name="tests",
    )
    await pool.close()


async def test_another_ca_is_refused(served: Served) -> None:
    for mode in ("verify-full", "verify-ca"):
        with pytest.raises(DatabaseUnavailable, match="TLS failed"):
            await connect(served.by(NAMED, mode, served.other_ca), application_name="tests")


async def test_another_name_is_refused_by_verify_full_alone(served: Served) -> None:
    with pytest.raises(DatabaseUnavailable, match="TLS failed"):
        await connect(served.by(UNNAMED, "verify-full", served.ca), application_name="tests")
    assert await _answers(served.by(UNNAMED, "verify-ca", served.ca))


def test_a_file_without_certificates_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "empty.crt").write_text("nothing")
    for name in ("empty.crt", "missing.crt"):
        with pytest.raises(ConfigError, match="certificates in PEM"):
            load_settings({"POSTGRES_SSLROOTCERT": str(tmp_path / name)})
