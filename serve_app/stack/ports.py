"""The ports that `up` needs: a clear word before the start, not a crash in the middle of it."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from dataclasses import dataclass

import psutil

from serve_app.errors import ConfigError


@dataclass(frozen=True, slots=True)
class NeededPort:
    """One address that will be listened on, and the setting that changes it."""

    setting: str
    host: str
    port: int


def check_free(needed: Iterable[NeededPort]) -> None:
    """Return if every port can be listened on.

    Raises:
        ConfigError: the first that cannot, who holds it if that can be seen; or one port twice.
    """
    seen: dict[int, str] = {}
    for item in needed:
        if item.port in seen:
            raise ConfigError(item.setting, item.port, f"a port other than {seen[item.port]}'s")
        seen[item.port] = item.setting
        _check(item)


def _check(item: NeededPort) -> None:
    try:
        family, _, _, _, address = socket.getaddrinfo(
            item.host, item.port, type=socket.SOCK_STREAM
        )[0]
    except socket.gaierror as error:
        raise ConfigError("COMP_AI_HTTP_HOST", item.host, f"an address ({error})") from None
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As servers do: a port whose last connections still fade away is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise ConfigError(item.setting, item.port, _explain(error, item.port)) from None


def _explain(error: OSError, port: int) -> str:
    holder = _holder(port)
    why = f"in use by {holder}" if holder else (error.strerror or "not free")
    return f"a free port (this one: {why})"


def _holder(port: int) -> str | None:
    try:
        connections = psutil.net_connections("tcp")
    except (psutil.Error, OSError):
        return None
    for connection in connections:
        listens = connection.status == psutil.CONN_LISTEN
        if listens and connection.laddr and connection.laddr.port == port and connection.pid:
            return _describe(connection.pid)
    return None


def _describe(pid: int) -> str:
    try:
        return f"{psutil.Process(pid).name()}, process {pid}"
    except psutil.Error:
        return f"process {pid}"


def pick_free(count: int, host: str = "127.0.0.1") -> list[int]:
    """Return `count` different ports that are free now."""
    sockets = [socket.socket(socket.AF_INET, socket.SOCK_STREAM) for _ in range(count)]
    try:
        for item in sockets:
            item.bind((host, 0))
        return [int(item.getsockname()[1]) for item in sockets]
    finally:
        for item in sockets:
            item.close()
