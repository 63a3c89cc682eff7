"""The record of a deployment: in the history on disk, and as acts in the audit log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from serve_app.audit.act import Actor, AuditAct
from serve_app.audit.log import AuditLog
from serve_app.cli.connection import connected
from serve_app.deploy.history import Entry, History, Outcome
from serve_app.errors import CompAIError
from serve_app.settings import PostgresSettings
from serve_app.stack.serve_api import Say

START, END = "deploy.start", "deploy.end"
_REASON_MAX_CHARS = 300


class DeployJournal:
    """Writes down what an operator deploys, before it is done and after.

    PostgreSQL may be away: going back must be possible all the same. Then `say` is told that the
    audit log lacks the act, which is in the history.
    """

    def __init__(
        self, history: History, postgres: Callable[[], PostgresSettings], say: Say
    ) -> None:
        self._history = history
        self._postgres = postgres
        self._say = say

    async def begun(self, entry: Entry, changes: Sequence[str]) -> None:
        """Note that `entry`, which is in the history, begins; it changes these applications."""
        await self._audit(START, entry, {"changes": list(changes)})

    async def ended(self, entry: Entry, outcome: Outcome, reason: str | None = None) -> None:
        """Note how it ended."""
        self._history.end(entry, outcome, reason)
        first = reason.splitlines()[0][:_REASON_MAX_CHARS] if reason else None
        await self._audit(END, entry, {"outcome": outcome.value, "reason": first})

    async def _audit(self, action: str, entry: Entry, more: dict[str, Any]) -> None:
        known = {"source": entry.source, "sha256": entry.sha256, "restores": entry.restores}
        act = AuditAct(
            actor=Actor.operator(), action=action, target=str(entry.number), after=known | more
        )
        try:
            async with (
                connected(self._postgres(), "comp-ai deploy") as connection,
                connection.transaction(),
            ):
                await AuditLog().append(connection, act)
        except CompAIError as error:
            self._say(f"not in the audit log: {error.message}")
