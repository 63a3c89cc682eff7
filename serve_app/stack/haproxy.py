"""HAProxy, which Ray Serve starts on every node in front of the gateways: its settings and folder.

Serve reads all of this from the environment, in each of its processes.
"""

from __future__ import annotations

import os
import shutil
import sys
from http import HTTPStatus
from pathlib import Path

import orjson

from serve_app.errors import (
    BodyTimeout,
    CompAIError,
    InvalidRequest,
    RequestError,
    Unavailable,
    to_openai,
)
from serve_app.settings import ServiceSettings
from serve_app.stack import haproxy_launcher
from serve_app.stack.home import Home
from serve_app.stack.open_files import most_open_files

LAUNCHER = "comp-ai-haproxy"

# A silence of this length is a dead peer; nginx and the gateway end a request long before.
_SILENCE_S = 3600
# nginx passes on four buffers of headers of 16 KiB each, and adds its own.
_BUFFER_BYTES = 72 * 1024
# Above nginx's `keepalive_timeout` of its upstream: that long a connection may still lead to a
# HAProxy of before, which knows the gateway that is to stop, and not the one that follows.
_GATEWAY_LEAVES_S = 10
_HEADERS = "Content-Type: application/json\r\nCache-Control: no-cache\r\nConnection: close\r\n"


def environment(home: Home, service: ServiceSettings) -> dict[str, str]:
    """Return the environment by which Serve uses HAProxy, or does not.

    Raises:
        CompAIError: HAProxy is not installed.
    """
    if not service.haproxy:
        return {"RAY_SERVE_ENABLE_HA_PROXY": "0"}
    folder = home.haproxy
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(_launcher()),
        # Serve puts the node's id between the folder and each name.
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / haproxy_launcher.CONTROL),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "state"),
        # Serve's own count of each request, beside ours and nginx's: off.
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        # Into files in that folder. Serve's default is whoever listens on port 514.
        "RAY_SERVE_HAPROXY_LOG_TARGET": "stdout format raw",
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, len(os.sched_getaffinity(0)))),
        # Each has two sides, and some files are for others. With Serve's default, 4096, it does
        # not start where fewer than 8,209 files may be open.
        "RAY_SERVE_HAPROXY_MAXCONN": str(most_open_files() * 3 // 8),
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(_BUFFER_BYTES),
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(_SILENCE_S),
        "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": str(_SILENCE_S),
        "RAY_SERVE_HAPROXY_TIMEOUT_CONNECT_S": "2",
        # A gateway that refuses one connection is dead: asked no more until its health is seen.
        "RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT": "1",
        # After a reload the HAProxy of before lets its streams end. Serve's default cuts them
        # after two minutes.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(_SILENCE_S),
        # Its default is made of the line above; new requests have left by then, see below.
        "RAY_SERVE_PORT_QUARANTINE_S": "60",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(_GATEWAY_LEAVES_S),
        # A dead HAProxy is replaced after three failed checks: 10 s apart by default.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        # On a busy machine its manager takes longer to start than three times 5 s. A deployment
        # waits for a minute.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "20",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(service.fallback_port),
        **_gateway_ports(service),
    }


def _gateway_ports(service: ServiceSettings) -> dict[str, str]:
    if (ports := service.node_ports) is None:
        return {}
    return {
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(ports.gateways.start),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(ports.gateways.stop),
    }


def _launcher() -> Path:
    beside = Path(sys.executable).parent / LAUNCHER
    found = beside if beside.exists() else shutil.which(LAUNCHER)
    try:
        haproxy_launcher.binary()
    except FileNotFoundError:
        found = None
    if found is None:
        raise CompAIError(
            "HAProxy is not installed: run `make setup`, or set COMP_AI_HAPROXY=false"
        )
    return Path(found)


def prepare(home: Home) -> None:
    """Write the answers that HAProxy gives itself; remove what an earlier run left."""
    folder = home.haproxy
    shutil.rmtree(folder, ignore_errors=True)
    (folder / haproxy_launcher.ANSWERS).mkdir(mode=0o700, parents=True)
    folder.chmod(0o700)
    for status, content in answers().items():
        (folder / haproxy_launcher.ANSWERS / f"{status}.http").write_bytes(content)


def answers() -> dict[int, bytes]:
    """Return the whole answer for each status of HAProxy's own, in OpenAI's form."""
    lost = Unavailable("The gateway was lost. Try again.", retry_after_s=1)
    invalid = InvalidRequest("The request is not valid HTTP, or its headers are too long.")
    errors = {400: invalid, 408: BodyTimeout(), 503: lost}
    given = haproxy_launcher.ANSWERED
    return {status: _answer(errors[answered]) for status, answered in given.items()}


def _answer(error: RequestError) -> bytes:
    body = orjson.dumps(to_openai(error))
    wait = "" if error.retry_after_s is None else f"Retry-After: {error.retry_after_s:g}\r\n"
    status = HTTPStatus(error.status)
    head = f"HTTP/1.1 {status.value} {status.phrase}\r\n{_HEADERS}{wait}"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body
