"""A change of the policy is an administrative act: it came through Serve's `user_config`."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Mapping
from typing import Any

import orjson

from serve_app.audit.act import SERVICE_ITSELF, Actor, AuditAct
from serve_app.audit.log import AuditLog, query
from serve_app.errors import RequestError
from serve_app.lazy_pool import Connection, LazyPool

CHANGE = "policy.change"
_TARGET = "gateway"
_ACTOR = Actor(id="user_config", kind=SERVICE_ITSELF)
_RETRY_S = 1.0


class PolicyJournal:
    """Sees that each policy of the gateways is in the audit log once, however many they are.

    Whoever takes over a policy notes it. The last one in the log is compared, so the other
    gateways, and those that start later, add nothing. PostgreSQL may be away: it is tried until
    it answers.
    """

    def __init__(self, pool: LazyPool) -> None:
        self._pool = pool
        self._log = AuditLog()
        self._wanted: dict[str, Any] | None = None
        self._writing: asyncio.Task[None] | None = None

    def note(self, policy: Mapping[str, Any]) -> None:
        """Write `policy` down where it is not the last one; never waits."""
        text = orjson.dumps(policy, option=orjson.OPT_SORT_KEYS)
        self._wanted = {"sha256": hashlib.sha256(text).hexdigest(), "policy": dict(policy)}
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_all(), name="policy-journal")

    async def written(self) -> None:
        """Return once nothing is left to write."""
        if self._writing is not None:
            await asyncio.shield(self._writing)

    async def close(self) -> None:
        """Stop trying; a policy that is not written by then is noted at the next start."""
        if self._writing is not None:
            self._writing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._writing

    async def _write_all(self) -> None:
        while (wanted := self._wanted) is not None:
            try:
                await self._write(wanted)
            except RequestError as error:
                await asyncio.sleep(error.retry_after_s or _RETRY_S)
                continue
            if self._wanted is wanted:
                self._wanted = None

    async def _write(self, wanted: dict[str, Any]) -> None:
        async with self._pool.connection() as connection, connection.transaction():
            # Held before the look, so that of several gateways one writes.
            await self._log.hold(connection)
            last = await _last(connection)
            if last is None or last["sha256"] != wanted["sha256"]:
                await self._log.append(
                    connection,
                    AuditAct(
                        actor=_ACTOR, action=CHANGE, target=_TARGET, before=last, after=wanted
                    ),
                )


async def _last(connection: Connection) -> dict[str, Any] | None:
    text = await connection.fetchval(query("last_after"), CHANGE)
    return None if text is None else orjson.loads(text)
