"""The queue in front of the models: who is asked for next, and what overload is answered."""

from __future__ import annotations

import asyncio
import contextvars

from serve_app.background import stop_tasks
from serve_app.config import ModelEntry
from serve_app.contracts import ModelPool, ModelState
from serve_app.metrics import GatewayMetrics
from serve_app.queueing.line import HeldLease, Line
from serve_app.queueing.ticket import Ticket

# Ray drops a gauge that is not set again.
_REPORT_EVERY_S = 2.0


class QueuedPool:
    """Orders requests fairly in front of a `ModelPool`, one line for each application.

    Models that share an application, such as the adapters of one engine, share its replicas
    and so its line.
    """

    def __init__(self, pool: ModelPool, metrics: GatewayMetrics) -> None:
        self._pool = pool
        self._metrics = metrics
        self._lines: dict[str, Line] = {}
        self._reporting: asyncio.Task[None] | None = None
        # A call that one request asked for may serve another: none is tied to a request.
        self._context = contextvars.copy_context()

    def start(self) -> None:
        """Begin to report how many wait."""
        self._reporting = asyncio.create_task(self._report(), name="report-queues")

    async def close(self) -> None:
        """Stop reporting, asking for slots and keeping them."""
        for line in self._lines.values():
            line.close()
        await stop_tasks(self._reporting)
        await self._pool.close()

    async def open(self, ticket: Ticket) -> HeldLease:
        """Wait for a slot at a replica. If cancelled at any moment, nothing stays held.

        Raises:
            ModelOverloaded: the queue is full; carries when a newcomer would be served.
            ModelNotReady: no slot in time, no replica and the model is not waited for, or
                its application is away or failed; carries when to try again.
        """
        return await self._line(ticket.model).wait(ticket)

    async def ready(self, model: ModelEntry) -> bool:
        """Tell whether a request for `model` would be served: now, or by starting a replica."""
        return await self._pool.state(model) in (ModelState.SERVING, ModelState.ASLEEP)

    def waiting(self, model: ModelEntry) -> int:
        """Return how many wait for the application of `model`."""
        return len(self._line(model))

    def _line(self, model: ModelEntry) -> Line:
        if model.app not in self._lines:
            self._lines[model.app] = Line(self._pool, self._context)
        return self._lines[model.app]

    async def _report(self) -> None:
        while True:
            for app, line in self._lines.items():
                self._metrics.requests_waiting(app, len(line))
            await asyncio.sleep(_REPORT_EVERY_S)
