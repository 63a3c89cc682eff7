"""The engine as a client sees it without Comp AI: its own port, under a lease of the test's."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from serve_app.replica import LEASE_HEADER, REQUEST_ID_HEADER
from tests.stack_runner import RunningStack, start_driver

# Each line asks for a lease at an application, an empty one gives it back.
_DRIVER = """
import json, sys
import ray
from ray import serve
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
call = None
for line in sys.stdin:
    if call is not None:
        call.cancel()
    call = None
    if app := line.strip():
        call = serve.get_app_handle(app).options(stream=True).lease.remote(None)
        grant = next(call)
        print(json.dumps([grant.address, grant.token]), file=answers, flush=True)
"""


class BareEngine:
    """The HTTP server of the replicas of one application."""

    def __init__(self, driver: subprocess.Popen[str], app: str) -> None:
        self._driver = driver
        self._app = app

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """Ask under a lease of its own and return the whole answer."""
        address, token = json.loads(self._say(self._app))
        try:
            headers = {LEASE_HEADER: token, REQUEST_ID_HEADER: "bare"}
            return httpx.post(f"http://{address}{path}", headers=headers, json=body, timeout=120)
        finally:
            self._write("")

    def _say(self, line: str) -> str:
        self._write(line)
        assert self._driver.stdout is not None
        return self._driver.stdout.readline()

    def _write(self, line: str) -> None:
        assert self._driver.stdin is not None
        self._driver.stdin.write(f"{line}\n")
        self._driver.stdin.flush()


@contextmanager
def bare_engine(stack: RunningStack, app: str) -> Iterator[BareEngine]:
    """Join the cluster of `stack` as a driver, to ask the engine of `app` directly."""
    driver = start_driver(stack.env, stack.home / "run" / "ray-token", _DRIVER)
    try:
        yield BareEngine(driver, app)
    finally:
        driver.kill()
        driver.wait()
