"""Small HTTP servers of this machine: one that takes what Alertmanager sends, one with a page."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class _Server:
    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_address[1])

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Quiet(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


class Receiver(_Server):
    """Takes notifications; `seen` has the receiver, the alert and its state of each."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, str, str]] = set()
        seen = self.seen

        class Handler(_Quiet):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                for alert in body["alerts"]:
                    name = alert["labels"]["alertname"]
                    seen.add((self.path.strip("/"), name, alert["status"]))
                self.send_response(200)
                self.end_headers()

        super().__init__(Handler)

    @property
    def url(self) -> str:
        """Address before the name of the receiver."""
        return f"http://127.0.0.1:{self.port}"


class Page(_Server):
    """Tells `text` to whoever reads it, as an exporter does; 503 where `told` says no.

    With a `token` it tells only who sends that as a bearer token, and 403 to others, as Ray does.
    """

    def __init__(
        self,
        text: str,
        told: Callable[[], bool] = lambda: True,
        content_type: str = "text/plain; version=0.0.4",
        token: str | None = None,
    ) -> None:
        self.text = text
        wanted = None if token is None else f"Bearer {token}"
        page = self

        class Handler(_Quiet):
            def do_GET(self) -> None:
                allowed = wanted in (None, self.headers["Authorization"])
                self.send_response((200 if told() else 503) if allowed else 403)
                self.send_header("Content-Type", content_type)
                self.end_headers()
                self.wfile.write(page.text.encode())

        super().__init__(Handler)
