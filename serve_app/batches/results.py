"""The result files of a batch: its lines, in the order of the input, as OpenAI writes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from serve_app.batches.batch import Counts, LineState, OpenBatch
from serve_app.batches.files import CHUNK_BYTES, add_chunk, new_file_id
from serve_app.batches.queries import query
from serve_app.batches.verdict import DESTROYED
from serve_app.batches.words import LineWords, line_words
from serve_app.lazy_pool import Connection
from serve_app.stored.vault import Vault

if TYPE_CHECKING:
    import asyncpg

# Rows that are fetched at a time; an answer can have megabytes.
_ROWS = 20
# The others have their request still.
ANSWERED = (LineState.COMPLETED, LineState.FAILED)


class ResultFile:
    """One file that grows line by line; there is none as long as it has no line."""

    def __init__(
        self, connection: Connection, vault: Vault, batch: OpenBatch, kind: str, keep_s: int
    ) -> None:
        self._connection = connection
        self._vault = vault
        self._batch = batch
        self._filename = f"{batch.id}_{kind}.jsonl"
        self._keep_s = keep_s
        self._buffer = bytearray()
        self._bytes = 0
        self._chunks = 0
        self.id: str | None = None
        self.lines = 0

    async def add(self, line: bytes) -> None:
        """Append a line."""
        if self.id is None:
            self.id = new_file_id()
            values = (self.id, self._batch.owner, self._filename, self._keep_s)
            await self._connection.execute(query("add_result_file"), *values)
        self.lines += 1
        self._buffer += line + b"\n"
        while len(self._buffer) >= CHUNK_BYTES:
            await self._write(self.id, CHUNK_BYTES)

    async def close(self) -> None:
        """Write what is left."""
        if self.id is None:
            return
        if self._buffer:
            await self._write(self.id, len(self._buffer))
        await self._connection.execute(query("measure_file"), self.id, self._bytes)

    async def _write(self, file_id: str, size: int) -> None:
        chunk = bytes(self._buffer[:size])
        del self._buffer[:size]
        place = file_id, self._chunks
        await add_chunk(self._connection, self._vault, self._batch.owner, place, chunk)
        self._chunks += 1
        self._bytes += size


async def write_results(
    connection: Connection, vault: Vault, batch: OpenBatch, keep_s: int
) -> tuple[ResultFile, ResultFile, Counts]:
    """Write the output and the error file of `batch` in the transaction of `connection`."""
    keep_s = batch.output_expires_after_s or keep_s
    output = ResultFile(connection, vault, batch, "output", keep_s)
    errors = ResultFile(connection, vault, batch, "error", keep_s)
    cursor = await connection.cursor(query("results"), batch.id)
    while rows := await cursor.fetch(_ROWS):
        texts = await vault.open(connection, [line_words(row, "response") for row in rows])
        for row, text in zip(rows, texts, strict=True):
            good = row["state"] == LineState.COMPLETED
            await (output if good else errors).add(orjson.dumps(result_line(batch.id, row, text)))
    await output.close()
    await errors.close()
    return output, errors, Counts(output.lines, errors.lines)


def result_line(batch_id: str, row: asyncpg.Record, text: bytes | None) -> dict[str, Any]:
    """Return the line of a result file that a row makes; `text` is its words, opened."""
    words = LineWords("", None) if text is None else LineWords.load(text)
    response = error = None
    if words.content is not None and row["state"] in ANSWERED:
        response = {
            "status_code": row["status_code"],
            "request_id": row["request_id"],
            "body": orjson.Fragment(words.content),
        }
    else:
        error = {
            "code": row["error_code"] or DESTROYED.error_code,
            "message": row["error_message"] or DESTROYED.error_message,
        }
    return {
        "id": f"batch_req_{batch_id.removeprefix('batch_')}_{row['number']}",
        "custom_id": words.custom_id,
        "response": response,
        "error": error,
    }
