"""Records, appended at the RequestLog deployment."""

from __future__ import annotations

from ray.serve.handle import DeploymentHandle

from deployments.seams.calls import answers, until_answered
from serve_app.errors import LogUnavailable
from serve_app.records import RequestRecord


class RayRecordSink:
    """Appends records at the RequestLog deployment."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def append(self, record: RequestRecord) -> None:
        """See `RecordSink.append`. Tries again, until cancelled, while the replica is away.

        A repeat is safe because the log knows a record by its id. The caller sets the time.
        """

        async def append() -> None:
            await self._handle.append.remote(record)

        await until_answered(append, LogUnavailable, LogUnavailable)

    async def works(self) -> bool:
        """Tell whether records can be taken now."""
        return await answers(self._handle.status.remote())
