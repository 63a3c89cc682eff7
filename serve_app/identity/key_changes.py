"""Notices of changed API keys, by PostgreSQL's LISTEN and NOTIFY.

What is known of a key can be believed for as long as it is certain that no notice was missed. That
is seen with a beat: a notice that a listener sends to itself. PostgreSQL delivers notices in the
order of their commits, so when the beat comes back, every change that was committed before it was
sent has been heard. A connection that is dead without saying so, or a pooler that does not pass
notices on, lets no beat through.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import asyncpg

from serve_app.database import CONNECT_ERRORS, DatabaseUnavailable, connect
from serve_app.log_setup import log_failure
from serve_app.settings import PostgresSettings

logger = logging.getLogger(__name__)

CHANNEL = "comp_ai_api_keys"

_CONNECT_TIMEOUT_S = 5.0
_LOST = (DatabaseUnavailable, asyncpg.InternalClientError, *CONNECT_ERRORS)

# Takes the prefix that changed, or None where all may have.
OnChange = Callable[[str | None], None]


@dataclass(slots=True)
class Watch:
    """A time in which no notice was missed: from its start to `confirmed_at`.

    `confirmed_at` is in monotonic seconds and moves on with each beat.
    """

    confirmed_at: float


class KeyChanges(Protocol):
    """Tells of changed keys."""

    @property
    def watch(self) -> Watch | None:
        """The watch that is kept now; None while notices may be missed."""
        ...

    def start(self, on_change: OnChange) -> None:
        """Begin to listen. Never waits; PostgreSQL may be away."""
        ...

    async def close(self) -> None:
        """Stop listening."""
        ...


class NoKeyChanges:
    """Tells of nothing: the table is asked each time that its last answer is not fresh."""

    watch: Watch | None = None

    def start(self, on_change: OnChange) -> None:
        """Do nothing."""

    async def close(self) -> None:
        """Do nothing."""


class KeyListener:
    """Listens on a connection of its own, and opens it again when it is lost.

    Args:
        open_connection: opens the connection.
        beat_s: time between two beats.
        patience_s: how long a beat may take before the connection is given up.
        retry_s, max_retry_s: first and longest wait before it is opened again.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        open_connection: Callable[[], Awaitable[asyncpg.Connection]],
        *,
        beat_s: float = 0.4,
        patience_s: float = 2.0,
        retry_s: float = 0.2,
        max_retry_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._open_connection = open_connection
        self._beat_s = beat_s
        self._patience_s = patience_s
        self._first_retry_s = retry_s
        self._max_retry_s = max_retry_s
        self._clock = clock
        self._retry_s = retry_s
        self._away = False
        self._task: asyncio.Task[None] | None = None
        self.watch: Watch | None = None

    def start(self, on_change: OnChange) -> None:
        """See `KeyChanges.start`."""
        if self._task is None:
            self._task = asyncio.create_task(self._listen_forever(on_change), name="key-changes")
            self._task.add_done_callback(self._note_end)

    async def close(self) -> None:
        """Stop listening and close the connection."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _listen_forever(self, on_change: OnChange) -> None:
        while True:
            try:
                async with self._connection() as connection:
                    await self._listen(connection, on_change)
            except _LOST as error:
                self._note_loss(error)
            await asyncio.sleep(self._retry_s)
            self._retry_s = min(self._retry_s * 2, self._max_retry_s)

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[asyncpg.Connection]:
        connection = await self._open_connection()
        try:
            yield connection
        finally:
            self.watch = None
            # It may be dead, and has nothing to say any more: no farewell to wait for.
            connection.terminate()

    async def _listen(self, connection: asyncpg.Connection, on_change: OnChange) -> None:
        def changed(_connection: Any, _pid: int, _channel: str, prefix: object) -> None:
            on_change(str(prefix) or None)

        async with asyncio.timeout(self._patience_s):
            # A beat is a commit, and nothing is lost with it.
            await connection.execute("set synchronous_commit = off")
            await connection.add_listener(CHANNEL, changed)
            heart = await _Heart.begin(connection)
        while True:
            sent_at = self._clock()
            async with asyncio.timeout(self._patience_s):
                await heart.beat()
            if self.watch is None:
                self._note_watch()
                self.watch = Watch(sent_at)
            self.watch.confirmed_at = sent_at
            await asyncio.sleep(self._beat_s)

    def _note_watch(self) -> None:
        self._retry_s = self._first_retry_s
        if self._away:
            logger.info("changes of API keys are heard again", extra={"action": "key_changes_up"})
        self._away = False

    def _note_loss(self, error: Exception) -> None:
        if not self._away:
            # The class only: a PostgreSQL message may quote values.
            logger.warning(
                "changes of API keys are not heard, so each key is looked up once a second: %s",
                type(error).__name__,
                extra={"action": "key_changes_down"},
            )
        self._away = True

    def _note_end(self, task: asyncio.Task[None]) -> None:
        self.watch = None
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            log_failure(logger, "listening for changes of API keys", error)


class _Heart:
    """Sends notices to its own channel and hears them."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection
        self._channel = f"{CHANNEL}_{secrets.token_hex(8)}"
        self._sent = 0
        self._heard = asyncio.Queue[str]()

    @classmethod
    async def begin(cls, connection: asyncpg.Connection) -> _Heart:
        """Listen to a new channel."""
        heart = cls(connection)
        await connection.add_listener(heart._channel, heart._hear)
        return heart

    def _hear(self, _connection: Any, _pid: int, _channel: str, beat: object) -> None:
        self._heard.put_nowait(str(beat))

    async def beat(self) -> None:
        """Return once a notice that is sent now has come back."""
        self._sent += 1
        beat = str(self._sent)
        await self._connection.execute("select pg_notify($1, $2)", self._channel, beat)
        while await self._heard.get() != beat:
            pass


def listen_to(settings: PostgresSettings) -> KeyListener:
    """Return a listener at the database of `settings`; opens no connection."""

    async def open_connection() -> asyncpg.Connection:
        return await connect(
            settings, application_name="comp-ai-key-changes", connect_timeout_s=_CONNECT_TIMEOUT_S
        )

    return KeyListener(open_connection)
