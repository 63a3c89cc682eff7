"""What a backup says of itself: the JSON file beside the dump.

It is written last, so there is one only where the dump beside it was whole.
"""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serve_app.audit.chain import Link
from serve_app.backup.errors import BackupDamaged

_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
NAME_PATTERN = r"^comp-ai-\d{8}T\d{6}\.\d{3}Z$"


class _Part(BaseModel):
    # A newer release may say more; what it says more is not needed to restore.
    model_config = ConfigDict(frozen=True, extra="ignore")


class AuditHead(_Part):
    """The end of the audit chain."""

    seq: int = Field(ge=0)
    hash: _Sha256

    @property
    def link(self) -> Link:
        """The same as the chain has it."""
        return Link(self.seq, bytes.fromhex(self.hash))


class DumpFile(_Part):
    """The file of pg_dump."""

    sha256: _Sha256
    bytes: int = Field(gt=0)
    # Version of pg_dump: a pg_restore that is older may not read it.
    program: str


class Contents(_Part):
    """What a database holds, all in one snapshot."""

    installation: uuid.UUID
    server: str = Field(description="Version of PostgreSQL.")
    role: str = Field(description="Owner of the schema; a restore grants it its privileges.")
    migrations: tuple[str, ...] = Field(min_length=1)
    rows: dict[str, int] = Field(description="Rows by table, those of its partitions summed.")
    audit: AuditHead

    @property
    def server_major(self) -> int:
        """The number before the first dot."""
        return int(self.server.split(".", 1)[0])

    def differences(self, other: Contents) -> list[str]:
        """Return what `other`, read after a restore, has otherwise."""
        tables = sorted(self.rows.keys() | other.rows.keys())
        found = [
            f"{table} has {other.rows.get(table)} rows, not {self.rows.get(table)}"
            for table in tables
            if self.rows.get(table) != other.rows.get(table)
        ]
        for name in ("installation", "migrations", "audit"):
            if getattr(self, name) != getattr(other, name):
                found.append(f"{name} differs")
        return found


class Manifest(_Part):
    """One backup. `verified_at` is when the dump was read back after it was written."""

    format: Literal[1] = 1
    name: str = Field(pattern=NAME_PATTERN)
    created_at: datetime
    verified_at: datetime
    contents: Contents
    dump: DumpFile

    def to_json(self) -> bytes:
        """Return the file's content."""
        return self.model_dump_json(indent=2).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes, name: str) -> Self:
        """Return what `to_json` wrote for the backup `name`.

        Raises:
            BackupDamaged: it is something else; does not quote it.
        """
        try:
            manifest = cls.model_validate_json(data)
        except ValidationError as error:
            place = ".".join(str(part) for part in error.errors()[0]["loc"])
            raise BackupDamaged(f"The manifest of {name} is damaged ({place or 'JSON'}).") from None
        if manifest.name != name:
            raise BackupDamaged(f"The manifest of {name} is that of {manifest.name}.")
        return manifest


def name_at(moment: datetime) -> str:
    """Return the name of a backup that is taken at `moment`, which is of UTC."""
    return f"comp-ai-{moment:%Y%m%dT%H%M%S}.{moment.microsecond // 1000:03}Z"
