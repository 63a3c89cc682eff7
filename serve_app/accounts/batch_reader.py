"""Batches of records as they come out of a spool: opened, and redacted where the policy says so."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from serve_app.accounts.metrics import LogMetrics
from serve_app.accounts.redaction import Redactor, redact
from serve_app.accounts.sealing.aead import SealBroken
from serve_app.accounts.sealing.master_keys import MasterKeyMissing, NoMasterKey
from serve_app.accounts.spool import Spool, SpooledRow
from serve_app.accounts.spooled import SpooledForm
from serve_app.config import Bodies
from serve_app.records import RequestRecord

# What says that a text cannot be sealed or opened with the keys that are there.
SEAL_ERRORS = (NoMasterKey, MasterKeyMissing, SealBroken)

_logger = logging.getLogger(__name__)

Poison = list[tuple[uuid.UUID, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows of a spool, the oldest first; `poison` are those that hold no record, and why.

    `full`: there may be more behind `last_seq`.
    """

    ids: list[uuid.UUID]
    records: list[RequestRecord]
    poison: Poison
    last_seq: int
    full: bool


class BatchReader:
    """Reads batches; the work on them is done in threads, so that appends need not wait."""

    def __init__(self, redactor: Redactor, metrics: LogMetrics) -> None:
        self._redactor = redactor
        self._metrics = metrics

    async def read(
        self, spool: Spool, limit: int, max_bytes: int, *, after: int = 0
    ) -> Batch | None:
        """Return the oldest rows behind the row `after`, or None where there are none.

        Raises:
            LogUnavailable: the spool cannot be read.
        """
        rows = await spool.batch(limit, max_bytes=max_bytes, after=after)
        if not rows:
            return None
        records, poison = await asyncio.to_thread(_decode, rows, spool.form)
        return Batch(
            ids=[row.id for row in rows],
            records=await self._redact(records),
            poison=poison,
            last_seq=rows[-1].seq,
            full=len(rows) == limit or sum(len(row.data) for row in rows) >= max_bytes,
        )

    async def _redact(self, records: list[RequestRecord]) -> list[RequestRecord]:
        if all(record.bodies != Bodies.REDACTED for record in records):
            return records
        done, failed = await asyncio.to_thread(redact, self._redactor, records)
        if failed:
            self._metrics.bodies_not_redacted(len(failed))
            _logger.error(
                "%d bodies could not be redacted; their shape alone is kept",
                len(failed),
                extra={
                    "action": "request_log.not_redacted",
                    "records": [str(record.id) for record in failed[:10]],
                },
            )
        return done


def _decode(rows: Sequence[SpooledRow], form: SpooledForm) -> tuple[list[RequestRecord], Poison]:
    records: list[RequestRecord] = []
    poison: Poison = []
    for row in rows:
        try:
            records.append(form.read(row.data))
        except ValueError as error:  # of another release, or damaged
            poison.append((row.id, f"not a record of this release: {type(error).__name__}"))
        except SEAL_ERRORS as error:
            poison.append((row.id, f"its texts do not open: {type(error).__name__}"))
    return records, poison
