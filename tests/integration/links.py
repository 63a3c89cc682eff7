"""A link to PostgreSQL that a test can break."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from serve_app.settings import PostgresSettings


@dataclass
class Link:
    """A TCP relay to PostgreSQL that can be cut, silenced and mended."""

    target: PostgresSettings
    port: int = 0
    _server: asyncio.Server | None = None
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)
    _speaking: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def settings(self) -> PostgresSettings:
        """How to reach PostgreSQL over the link."""
        changes = {"host": "127.0.0.1", "port": self.port, "sslmode": "disable"}
        return self.target.model_copy(update=changes)

    async def mend(self) -> None:
        """Take connections, the first time or again."""
        self._speaking.set()
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    def silence(self) -> None:
        """Pass nothing on any more, and close nothing: as when a firewall forgets a connection."""
        self._speaking.clear()

    async def cut(self) -> None:
        """Close every connection, and take no new one."""
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far = await self._reach()
        except OSError:
            writer.transport.abort()
            return
        pair = {writer, far[1]}
        self._writers |= pair
        try:
            await asyncio.gather(self._copy(reader, far[1]), self._copy(far[0], writer))
        finally:
            self._writers -= pair
            for end in pair:
                end.close()

    async def _reach(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, port = self.target.host, self.target.port
        if host.startswith("/"):
            return await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        return await asyncio.open_connection(host, port)

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                await self._speaking.wait()
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()  # also after a reset: the other end is to learn of it
