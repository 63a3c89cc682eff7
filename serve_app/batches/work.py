"""What a runner asks of PostgreSQL: which batches there are, and their lines one by one."""

from __future__ import annotations

import uuid
from collections.abc import Collection

from serve_app.batches.batch import Line, OpenBatch
from serve_app.batches.queries import query
from serve_app.batches.verdict import Finished, Postponed
from serve_app.lazy_pool import LazyPool


class BatchWork:
    """Every method raises StoreUnavailable without PostgreSQL."""

    def __init__(self, pool: LazyPool) -> None:
        self._pool = pool

    async def open(self) -> list[OpenBatch]:
        """Return the batches that have not ended, the oldest first."""
        async with self._pool.connection() as connection:
            return [OpenBatch.of(row) for row in await connection.fetch(query("open_batches"))]

    async def claim(self, batch: OpenBatch, claim_s: float) -> Line | None:
        """Take a line that is ready; nobody else gets it for `claim_s`. None: there is none."""
        async with self._pool.connection() as connection:
            row = await connection.fetchrow(query("claim_line"), batch.id, claim_s)
        return None if row is None else Line(batch=batch, **dict(row))

    async def renew(self, lines: Collection[Line], claim_s: float) -> set[uuid.UUID]:
        """Hold lines for `claim_s` from now; return the claims that still hold."""
        async with self._pool.connection() as connection:
            rows = await connection.fetch(
                query("renew_claims"),
                [line.batch.id for line in lines],
                [line.number for line in lines],
                [line.claim for line in lines],
                claim_s,
            )
        return {row["claim"] for row in rows}

    async def finish(self, line: Line, result: Finished) -> bool:
        """Write the result of a line; False where the claim was lost, and nothing is written."""
        async with self._pool.connection() as connection:
            number = await connection.fetchval(
                query("finish_line"),
                line.batch.id,
                line.number,
                line.claim,
                result.state,
                result.status_code,
                result.request_id,
                result.response,
                result.error_code,
                result.error_message,
            )
        return number is not None

    async def postpone(self, line: Line, verdict: Postponed) -> bool:
        """Put a line back until later; False where the claim was lost."""
        async with self._pool.connection() as connection:
            number = await connection.fetchval(
                query("postpone_line"),
                line.batch.id,
                line.number,
                line.claim,
                verdict.attempts,
                verdict.waits,
                verdict.delay_s,
            )
        return number is not None

    async def give_up(self, line: Line) -> bool:
        """Put a line back for whoever comes; False where the claim was lost."""
        back = Postponed(attempts=line.attempts, waits=line.waits, delay_s=0.0)
        return await self.postpone(line, back)
