"""The flags of Ray Serve without which a promise of ours does not hold.

Ray reads them in each of its processes, so they must be set where Ray is started.
"""

from __future__ import annotations

from collections.abc import Mapping

from serve_app.errors import ConfigError

_NEEDED = {
    # Without these two a client that does not read makes Serve keep its whole answer in memory.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # Without this one answers and records over 4 MiB are lost. What bounds them is our policy.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": "2147483647",
}


def check_flags(environ: Mapping[str, str]) -> None:
    """Check that Ray was started with the flags that we need.

    Raises:
        ConfigError: naming the first that has another value or is not set.
    """
    for name, value in _NEEDED.items():
        if environ.get(name) != value:
            raise ConfigError(name, environ.get(name), f"{value}, set where Ray is started")
