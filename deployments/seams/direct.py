"""The way to a deployment that takes direct calls."""

from __future__ import annotations

from ray.serve.handle import DeploymentHandle

from deployments.seams.calls import CallFailed, called
from serve_app.direct import DirectLine, Door, LineLost


def line_to(handle: DeploymentHandle) -> DirectLine:
    """Return a line to the replica of `handle` that Ray names."""

    async def find() -> Door:
        try:
            door: Door = await called(handle.door.remote)
        except CallFailed as error:
            raise LineLost("Ray did not say where.") from error
        return door

    return DirectLine(find)
