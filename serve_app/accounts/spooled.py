"""How a record lies in the spool: JSON, its two texts sealed, so that none is in the clear on disk.

They are sealed with a key that the master key gives, because PostgreSQL, where the keys of
subjects are, may be away. A row of before, whose texts are not sealed, is read all the same.
"""

from __future__ import annotations

import uuid
from dataclasses import fields, replace
from typing import Any

import orjson

from serve_app.accounts.sealing.aead import Sealer
from serve_app.accounts.sealing.master_keys import MasterKeys, NoMasterKey
from serve_app.errors import LogUnavailable
from serve_app.records import RequestRecord

_PURPOSE = "spool"
_MASTER = "sealed_by"
# Between the JSON, which holds no such byte, and the sealed texts.
_END = b"\x00"


class SpooledForm:
    """Writes and reads what the spool keeps of a record."""

    def __init__(self, masters: MasterKeys) -> None:
        self._masters = masters
        self._sealers: dict[str, Sealer] = {}

    def write(self, record: RequestRecord) -> bytes:
        """Return `record` as the spool keeps it.

        Raises:
            LogUnavailable: it cannot be written; without a master key none that has texts.
        """
        try:
            return self._write(record)
        except TypeError:
            pass  # a lone surrogate, which JSON lets a client write and UTF-8 cannot hold
        try:
            return self._write(_mended(record))
        except TypeError as error:
            raise LogUnavailable from error

    def read(self, data: bytes) -> RequestRecord:
        """Return the record in `data`.

        Raises:
            ValueError: it holds none that this release knows.
            MasterKeyMissing, SealBroken: its texts do not open.
        """
        head, _, sealed = data.partition(_END)
        raw: dict[str, Any] = orjson.loads(head)
        if sealed:
            raw |= self._open(str(raw.get("id")), raw.pop(_MASTER, ""), sealed)
        return RequestRecord.from_dict(raw)

    def _write(self, record: RequestRecord) -> bytes:
        if not record.has_texts:
            return record.to_json()
        try:
            master = self._masters.current_id
        except NoMasterKey:
            raise LogUnavailable from None
        texts = orjson.dumps(
            {"request_body": record.request_body, "response_text": record.response_text}
        )
        sealed = self._sealer(master).seal(texts, record.id.bytes)
        bare = replace(record, request_body=None, response_text=None)
        return bare.to_json(**{_MASTER: master}) + _END + sealed

    def _open(self, record_id: str, master: str, sealed: bytes) -> dict[str, Any]:
        place = uuid.UUID(record_id).bytes
        texts: dict[str, Any] = orjson.loads(self._sealer(master).open(sealed, place))
        return texts

    def _sealer(self, master: str) -> Sealer:
        if master not in self._sealers:
            self._sealers[master] = Sealer(self._masters.derive(_PURPOSE, master))
        return self._sealers[master]


def _mended(record: RequestRecord) -> RequestRecord:
    texts: dict[str, Any] = {
        field.name: value.encode("utf-8", "replace").decode("utf-8")
        for field in fields(record)
        if type(value := getattr(record, field.name)) is str
    }
    return replace(record, **texts)
