"""The real nginx with the real template, in front of a gateway of `fakes`."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

from serve_app.stack import nginx
from serve_app.stack.ports import pick_free
from tests.integration.fakes import World


@contextmanager
def door(served: World, **values: str) -> Iterator[int]:
    """Put nginx before the gateway; yields its port."""
    [port] = pick_free(1)
    server = nginx.prepare(
        {
            "COMP_AI_NGINX_LISTEN": f"127.0.0.1:{port}",
            "COMP_AI_NGINX_UPSTREAM": served.server.address,
            "COMP_AI_NGINX_LOG": "/dev/null",
            **{f"COMP_AI_NGINX_{name.upper()}": value for name, value in values.items()},
        }
    )
    process = subprocess.Popen(server.command, stderr=subprocess.DEVNULL)
    try:
        deadline_s = time.monotonic() + 20
        while not _listens(port):
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        yield port
    finally:
        process.terminate()
        process.wait(20)
        server.remove()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
