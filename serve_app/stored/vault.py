"""Seals and opens what callers store, with the key of whose it is, on behalf of a gateway."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from serve_app.accounts.sealing.aead import SealBroken
from serve_app.accounts.sealing.cells import Cell, open_cells
from serve_app.accounts.sealing.master_keys import MasterKeyMissing, NoMasterKey
from serve_app.accounts.sealing.subject_keys import SealedText, SubjectKeys, Text
from serve_app.errors import StoreUnavailable
from serve_app.lazy_pool import Connection

logger = logging.getLogger(__name__)


class Vault:
    """Every method raises StoreUnavailable where a key that it needs is not here."""

    def __init__(self, keys: SubjectKeys) -> None:
        self._keys = keys

    async def seal(
        self, connection: Connection, subject: str, texts: Sequence[tuple[bytes, bytes]]
    ) -> list[SealedText]:
        """Seal texts of `subject`, each given as its place and itself.

        Nobody destroys the key before the transaction of `connection` ends: what was sealed with
        one that an erasure destroyed is never written after it.

        Raises:
            RuntimeError: `connection` is not in a transaction.
        """
        with _keys_at_hand():
            return await self._keys.seal(connection, [Text(subject, *text) for text in texts])

    async def open(self, connection: Connection, cells: Sequence[Cell]) -> list[bytes | None]:
        """Return the texts in their order; None where there is none, or its key was destroyed."""
        with _keys_at_hand():
            return await open_cells(connection, self._keys, cells)


@contextmanager
def _keys_at_hand() -> Iterator[None]:
    try:
        yield
    except NoMasterKey:
        message = "No master key is set, so nothing of yours can be kept here."
        raise StoreUnavailable(message) from None
    except (MasterKeyMissing, SealBroken) as error:
        # Of a master key the error holds the id alone, of a text nothing.
        logger.error(
            "a stored text cannot be sealed or opened: %s",
            error if isinstance(error, MasterKeyMissing) else type(error).__name__,
            extra={"action": "stored_text_locked"},
        )
        raise StoreUnavailable from error
