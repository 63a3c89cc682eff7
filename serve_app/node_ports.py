"""The ports of one node of a cluster, out of one range, so that a firewall can name them.

first + 0   Ray's node manager
first + 1   Ray's object manager
first + 2   Ray's agent for runtime environments
first + 3   Ray's dashboard agent, HTTP
first + 4   Ray's dashboard agent, gRPC
first + 5   Ray's client server, on the head
then        model replicas, HTTP, and what gateways call directly: a quarter of the range
then        gateways, where HAProxy asks them: an eighth of the range
the rest    Ray's workers
"""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass

LEAST_PORTS = 100
_SINGLE = 6
_FORM = re.compile(r"([0-9]{1,5})-([0-9]{1,5})")


@dataclass(frozen=True, slots=True)
class NodePorts:
    """The range `first` to `last`, both included."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> NodePorts:
        """Read `first-last`. Raises ValueError where it is not a range that is large enough."""
        found = _FORM.fullmatch(text.strip())
        first, last = (0, 0) if found is None else (int(found[1]), int(found[2]))
        if first < 1024 or last > 65535 or last - first + 1 < LEAST_PORTS:
            raise ValueError(f"first-last, at least {LEAST_PORTS} ports between 1024 and 65535")
        return cls(first, last)

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"

    @property
    def node_manager(self) -> int:
        """Of Ray's node manager."""
        return self.first

    @property
    def object_manager(self) -> int:
        """Of Ray's object manager."""
        return self.first + 1

    @property
    def runtime_env_agent(self) -> int:
        """Of Ray's agent for runtime environments."""
        return self.first + 2

    @property
    def dashboard_agent(self) -> int:
        """Of the dashboard's agent, HTTP."""
        return self.first + 3

    @property
    def dashboard_agent_grpc(self) -> int:
        """Of the dashboard's agent, gRPC."""
        return self.first + 4

    @property
    def client_server(self) -> int:
        """Of Ray's client server, on the head."""
        return self.first + 5

    @property
    def replicas(self) -> range:
        """Of the HTTP servers of model replicas, and of what gateways call directly."""
        start = self.first + _SINGLE
        return range(start, start + (self.last - self.first + 1) // 4)

    @property
    def gateways(self) -> range:
        """Of what HAProxy asks: gateways, and one of each model replica, where it asks nothing."""
        start = self.replicas.stop
        return range(start, start + (self.last - self.first + 1) // 8)

    @property
    def workers(self) -> range:
        """Of Ray's workers."""
        return range(self.gateways.stop, self.last + 1)


def listen(host: str, ports: Sequence[int]) -> socket.socket:
    """Return a socket that listens on the first of `ports` that is free, or any without them.

    Raises OSError: none is free, or `host` is not of this machine.
    """
    ports = ports or (0,)
    # Replicas of this node that start at the same time do not all try the same one first.
    start = os.getpid() % len(ports)
    for port in (*ports[start:], *ports[:start]):
        try:
            return socket.create_server((host, port), backlog=2048)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise OSError(errno.EADDRINUSE, f"no free port from {ports[0]} to {ports[-1]}")
