"""Which processes serve, before and after a deployment."""

from __future__ import annotations

from tests.serve_configs import FAKE_MODEL
from tests.stack_runner import RunningStack

GATEWAY_APP = ("Gateway", "Limits", "RequestLog")
CHANGED = ("Gateway", f"Model:{FAKE_MODEL}")


def pids(stack: RunningStack, *deployments: str) -> set[int]:
    """Return the replica processes of `deployments`."""
    return {replica.pid for name in deployments for replica in stack.replicas(name)}


def replaced(stack: RunningStack, before: set[int], *deployments: str) -> bool:
    """Tell whether `deployments` are of as many processes as `before`, and of none of those."""
    now = pids(stack, *deployments)
    return len(now) == len(before) and not now & before
