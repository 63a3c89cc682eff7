"""The report of an erasure, signed with the service's key.

The key is Ed25519 (RFC 8032), derived from the master key with HKDF; the report names the master
key and holds the public key. What is signed is the report as JSON with sorted names.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

import orjson
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from serve_app.accounts.sealing.master_keys import MasterKeyMissing, MasterKeys
from serve_app.errors import CompAIError
from serve_app.subjects.erasing import DELETED, RENAMED, Erased

_PURPOSE = "report-signature"
ALGORITHM = "Ed25519"
_REMAINS = (
    ("comp_ai.audit_log", "append-only and chained by hashes: it is kept as evidence"),
    (
        "rows of the pseudonym",
        "requests, usage and revoked API keys without name, address and text, for the totals",
    ),
    (
        "the journal of the limits, on the disk of its node",
        "what was used under the name, until the month ends",
    ),
    (
        "records in the spools of the request log, and log files",
        "records lose name and text when they reach PostgreSQL; log files go by their rotation",
    ),
    (
        "the key ring beside the backups",
        "it holds the destroyed key until it is written again, which every backup does",
    ),
    (
        "backups from before",
        "their sealed texts cannot be read; names, and texts from before the sealing, are erased "
        "again by `comp-ai backup restore`",
    ),
)


class ReportInvalid(CompAIError):
    """The report was changed, or another installation signed it."""


def signed_report(erased: Erased, masters: MasterKeys) -> dict[str, Any]:
    """Return the report of an erasure, signed with the current master key's."""
    report = {
        "object": "subject.erasure",
        "erasure": str(erased.erasure.id),
        "subject": erased.subject,
        "pseudonym": erased.erasure.pseudonym,
        "begun_at": erased.begun_at.isoformat(),
        "erased_at": erased.erasure.erased_at.isoformat(),
        "finished_at": erased.finished_at.isoformat(),
        "resumed": erased.resumed,
        "found": dict(erased.found),
        "keys_destroyed": erased.done["subject_keys"],
        "deleted": {step: erased.done[step] for step in DELETED},
        "pseudonymised": {step: erased.done[step] for step in RENAMED},
        "still_named": {place: rows for place, rows in erased.left.items() if rows},
        "remains": [{"what": what, "why": why} for what, why in _REMAINS],
    }
    return sign(report, masters)


def sign(report: dict[str, Any], masters: MasterKeys) -> dict[str, Any]:
    """Return `report` with the signature of the current master key beside it."""
    name = masters.current_id
    key = _key(masters, name)
    return {
        "report": report,
        "signature": {
            "algorithm": ALGORITHM,
            "master_key_id": name,
            "public_key": _public(key),
            "value": base64.b64encode(key.sign(_canonical(report))).decode(),
        },
    }


def verify(data: bytes, masters: MasterKeys) -> dict[str, Any]:
    """Return the report in `data`, which one of our master keys has signed.

    Raises:
        ReportInvalid: it was changed, is none, or was not signed by us.
        MasterKeyMissing: it names a master key that is not among ours.
    """
    try:
        signed = orjson.loads(data)
        report, signature = signed["report"], signed["signature"]
        key = _key(masters, signature["master_key_id"])
        value = base64.b64decode(signature["value"], validate=True)
        key.public_key().verify(value, _canonical(report))
    except MasterKeyMissing:
        raise
    except (ValueError, KeyError, TypeError, binascii.Error, InvalidSignature):
        raise ReportInvalid from None
    if signature.get("public_key") != _public(key) or signature.get("algorithm") != ALGORITHM:
        raise ReportInvalid
    return dict(report)


def _key(masters: MasterKeys, name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(masters.derive(_PURPOSE, name))


def _public(key: Ed25519PrivateKey) -> str:
    raw = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    return base64.b64encode(raw).decode()


def _canonical(report: dict[str, Any]) -> bytes:
    return orjson.dumps(report, option=orjson.OPT_SORT_KEYS)
