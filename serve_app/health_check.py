"""What a container's health check runs: exit code 0 if the gateway answers at /health."""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request

_TIMEOUT_S = 8.0


def healthy(port: str) -> bool:
    """Tell whether the gateway behind this port of our own machine answers."""
    # No proxy of the environment, and nothing imported that takes a second to load.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/health", timeout=_TIMEOUT_S) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


if __name__ == "__main__":
    sys.exit(0 if healthy(os.environ.get("COMP_AI_PORT") or "3002") else 1)
