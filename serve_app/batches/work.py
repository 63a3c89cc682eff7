"""What a runner asks of PostgreSQL: which batches there are, and their lines one by one."""

from __future__ import annotations

import uuid
from collections.abc import Collection

from serve_app.accounts.sealing.places import line_place
from serve_app.batches.batch import Line, OpenBatch
from serve_app.batches.queries import query
from serve_app.batches.verdict import Finished, Postponed
from serve_app.batches.words import LineWords, line_words
from serve_app.lazy_pool import LazyPool
from serve_app.stored.vault import Vault


class BatchWork:
    """Every method raises StoreUnavailable without PostgreSQL or a key."""

    def __init__(self, pool: LazyPool, vault: Vault) -> None:
        self._pool = pool
        self._vault = vault

    async def open(self) -> list[OpenBatch]:
        """Return the batches that have not ended, the oldest first."""
        async with self._pool.connection() as connection:
            return [OpenBatch.of(row) for row in await connection.fetch(query("open_batches"))]

    async def claim(self, batch: OpenBatch, claim_s: float) -> Line | None:
        """Take a line that is ready; nobody else gets it for `claim_s`. None: there is none."""
        async with self._pool.connection() as connection:
            row = await connection.fetchrow(query("claim_line"), batch.id, claim_s)
            if row is None:
                return None
            [text] = await self._vault.open(connection, [line_words(row, "body")])
        words = LineWords("", None) if text is None else LineWords.load(text)
        return Line(
            batch=batch,
            number=row["number"],
            custom_id=words.custom_id,
            body=words.content,
            claim=row["claim"],
            attempts=row["attempts"],
            waits=row["waits"],
            revoked=row["revoked"],
        )

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
        words = LineWords(line.custom_id, result.response)
        text = line_place(line.batch.id, line.number), words.dump()
        async with self._pool.connection() as connection, connection.transaction():
            [one] = await self._vault.seal(connection, line.batch.owner, [text])
            number = await connection.fetchval(
                query("finish_line"),
                line.batch.id,
                line.number,
                line.claim,
                result.state,
                result.status_code,
                result.request_id,
                result.error_code,
                result.error_message,
                one.key_id,
                one.sealed,
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
