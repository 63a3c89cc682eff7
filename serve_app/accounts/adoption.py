"""The spools of others that this process empties, because nobody else holds them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

from serve_app.accounts.spool import Spool
from serve_app.accounts.spool_folders import SpoolFolders

_logger = logging.getLogger(__name__)


class Adoption:
    """Keeps adopted spools open until they are empty. Without folders it adopts none."""

    def __init__(self, folders: SpoolFolders | None, every_s: float) -> None:
        self._folders = folders
        self._every_s = every_s
        self._due_s = 0.0
        self._spools: list[Spool] = []

    def __iter__(self) -> Iterator[Spool]:
        """Yield those that are open; one may be let go meanwhile."""
        return iter(tuple(self._spools))

    def __bool__(self) -> bool:
        """Tell whether one is open."""
        return bool(self._spools)

    async def look(self) -> None:
        """Adopt what nobody holds, where it is time to look again."""
        if self._folders is None or time.monotonic() < self._due_s:
            return
        async for spool in self._folders.abandoned():
            self._spools.append(spool)
            _logger.warning(
                "a spool was left with records; they are moved to PostgreSQL from here",
                extra={"action": "spool.adopted", "folder": str(spool.folder)},
            )
        self._due_s = time.monotonic() + self._every_s

    async def let_go(self, spool: Spool, *, failed: bool = False) -> None:
        """Close one that is empty, or that failed; its folder may be taken again."""
        assert self._folders is not None
        await self._folders.let_go(spool, failed=failed)
        self._spools.remove(spool)  # last: if cancelled before, `close` does it again

    async def close(self) -> None:
        """Close all; what is left in them is for others."""
        for spool in self._spools:
            await spool.close()
        self._spools.clear()
