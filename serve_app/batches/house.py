"""The steps that a batch takes as a whole: checked, begun, ended, its results written.

Each is one transaction, taken by one gateway at a time. A gateway that dies in it leaves nothing
behind, and the next one takes the step again.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

from serve_app.accounts.sealing.places import batch_place, line_place
from serve_app.audit.act import Actor, AuditAct
from serve_app.audit.log import AuditLog
from serve_app.audit.refusals import REFUSE
from serve_app.batches.batch import OpenBatch, Status
from serve_app.batches.files import read_chunk
from serve_app.batches.queries import query
from serve_app.batches.results import write_results
from serve_app.batches.validation import LineChecker, LineRequest, LineSplitter
from serve_app.batches.verdict import CANCELLED, EXPIRED
from serve_app.batches.words import BatchWords, LineWords, batch_words
from serve_app.config import GatewayConfig
from serve_app.identity.access import with_access
from serve_app.lazy_pool import Connection, LazyPool
from serve_app.stored.vault import Vault

logger = logging.getLogger(__name__)

# The whole of a file is read or written in one transaction.
_STEP_TIMEOUT_S = 600.0
_NO_FILE = {
    "code": "file_not_found",
    "message": "The input file was deleted or has expired.",
    "param": "input_file_id",
    "line": None,
}


class _Gone(Exception):
    """The batch was deleted while its results were written: they go with it."""


class House:
    """Every method raises StoreUnavailable without PostgreSQL or a key."""

    def __init__(self, pool: LazyPool, vault: Vault) -> None:
        self._pool = pool
        self._vault = vault

    async def tend(self, batch: OpenBatch, config: GatewayConfig) -> bool:
        """Take the next step of `batch`, if there is one; tell whether it was begun by that."""
        if batch.overdue and batch.status in (Status.VALIDATING, Status.IN_PROGRESS):
            await self._execute("expire_batch", batch)
            batch = replace(batch, status=Status.FINALIZING)
        if batch.status is Status.VALIDATING:
            return await self._begin(batch, config)
        if batch.status is Status.IN_PROGRESS:
            if not batch.settled:
                return False
            await self._execute("begin_finalizing", batch)
            batch = replace(batch, status=Status.FINALIZING)
        with suppress(_Gone):
            await self._end(batch, config)
        return False

    async def _execute(self, name: str, batch: OpenBatch) -> None:
        async with self._pool.connection() as connection:
            await connection.execute(query(name), batch.id)

    @asynccontextmanager
    async def _alone(self, batch: OpenBatch) -> AsyncIterator[Connection | None]:
        """Begin a transaction on a batch that is still as we know it; None where it is not ours."""
        async with (
            self._pool.connection(timeout_s=_STEP_TIMEOUT_S) as connection,
            connection.transaction(),
        ):
            ours = await connection.fetchval(query("lock_batch"), batch.id)
            if ours and await connection.fetchval(query("batch_status"), batch.id) == batch.status:
                yield connection
            else:
                yield None

    # The beginning.

    async def _begin(self, batch: OpenBatch, config: GatewayConfig) -> bool:
        async with self._alone(batch) as connection:
            if connection is None:
                return False
            principal = with_access(batch.principal, config)
            checker = LineChecker(config, principal, batch.endpoint)
            found = await self._add_lines(connection, batch, checker, config)
            errors = checker.errors() if found else [_NO_FILE]
            if not errors:
                values = (batch.id, checker.total, checker.model)
                if await connection.fetchval(query("begin_batch"), *values) is not None:
                    _log(batch, "batch_begun")
                    return True
            # Wrong, or cancelled meanwhile.
            await connection.execute(query("drop_lines"), batch.id)
            if errors:
                await self._fail(connection, batch, errors)
                await AuditLog().append_all(connection, _refusals(batch, checker))
                _log(batch, "batch_failed")
        return False

    async def _add_lines(
        self,
        connection: Connection,
        batch: OpenBatch,
        checker: LineChecker,
        config: GatewayConfig,
    ) -> bool:
        """Add the lines of the input file; False where the file is not there."""
        file = await connection.fetchrow(query("find_file"), batch.input_file_id, batch.owner)
        if file is None:
            return False
        splitter = LineSplitter(config.max_body_bytes)
        read_bytes = number = 0
        while read_bytes < file["bytes"] and not checker.full:
            chunk = await read_chunk(connection, self._vault, batch.input_file_id, number)
            if chunk is None:
                return False
            checked = [checker.check(*line) for line in splitter.feed(chunk)]
            await self._insert(connection, batch, [line for line in checked if line is not None])
            read_bytes += len(chunk)
            number += 1
        checked = [checker.check(*line) for line in splitter.last()]
        await self._insert(connection, batch, [line for line in checked if line is not None])
        return True

    async def _insert(
        self, connection: Connection, batch: OpenBatch, lines: list[LineRequest]
    ) -> None:
        if not lines:
            return
        texts = [
            (line_place(batch.id, line.number), LineWords(line.custom_id, line.body).dump())
            for line in lines
        ]
        sealed = await self._vault.seal(connection, batch.owner, texts)
        await connection.execute(
            query("add_lines"),
            batch.id,
            [line.number for line in lines],
            [one.key_id for one in sealed],
            [one.sealed for one in sealed],
        )

    async def _fail(
        self, connection: Connection, batch: OpenBatch, errors: list[dict[str, Any]]
    ) -> None:
        row = await connection.fetchrow(query("batch_words"), batch.id)
        assert row is not None  # its status was read in this transaction
        [text] = await self._vault.open(connection, [batch_words(row)])
        words = replace(BatchWords.load(text), errors=errors)
        place = batch_place(batch.id)
        [one] = await self._vault.seal(connection, batch.owner, [(place, words.dump())])
        await connection.execute(query("fail_batch"), batch.id, one.key_id, one.sealed)

    # The end.

    async def _end(self, batch: OpenBatch, config: GatewayConfig) -> None:
        unfinished = CANCELLED if batch.status is Status.CANCELLING else EXPIRED
        async with self._pool.connection(timeout_s=_STEP_TIMEOUT_S) as connection:
            await connection.execute(
                query("close_lines"),
                batch.id,
                unfinished.state,
                unfinished.error_code,
                unfinished.error_message,
            )
        async with self._alone(batch) as connection:
            if connection is None or await connection.fetchval(query("lines_are_open"), batch.id):
                return
            output, errors, counts = await write_results(
                connection, self._vault, batch, config.files.retention_s
            )
            values = (batch.status, output.id, errors.id, counts.completed, counts.failed)
            # An erasure that deletes the batch first does not see the files of this transaction.
            if await connection.fetchval(query("end_batch"), batch.id, *values) is None:
                raise _Gone
            await connection.execute(query("drop_lines"), batch.id)
            _log(batch, "batch_ended")


def _refusals(batch: OpenBatch, checker: LineChecker) -> list[AuditAct]:
    actor = Actor(
        id=batch.principal.id, kind=batch.principal.kind, api_key_id=batch.principal.api_key_id
    )
    after = {"batch": batch.id}
    return [
        AuditAct(actor=actor, action=REFUSE, target=denied, after=after)
        for denied in sorted(checker.denied)
    ]


def _log(batch: OpenBatch, action: str) -> None:
    logger.info("batch %s: %s", batch.id, action, extra={"action": action})
