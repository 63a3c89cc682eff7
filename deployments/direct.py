"""The half of a deployment that gateways call directly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ray

from serve_app.direct import DirectServer, Door, Handler
from serve_app.errors import HandedOver
from serve_app.settings import ServiceSettings


def replica_address(service: ServiceSettings) -> tuple[str, Sequence[int]]:
    """Return where a replica of this node listens: the address, and the ports if they are set."""
    ports = service.node_ports
    return ray.util.get_node_ip_address(), () if ports is None else ports.replicas


class Direct:
    """Mixin of a deployment class that gateways call directly."""

    async def open_direct(self, handlers: Mapping[int, Handler], service: ServiceSettings) -> None:
        """Take direct calls on this node. Raises OSError if it cannot listen."""
        self._direct = DirectServer(handlers, *replica_address(service))
        self._door: Door | None = await self._direct.start()

    async def close_direct(self) -> None:
        """Take no more; return once those under way are answered. The gateways go elsewhere."""
        self._door = None
        await self._direct.close()

    async def door(self) -> Door:
        """Return where direct calls go. Raises HandedOver where none are taken any more."""
        if self._door is None:
            raise HandedOver
        return self._door
