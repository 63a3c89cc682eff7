"""Another replica for a request whose first one failed before it sent a byte."""

from __future__ import annotations

import asyncio

from serve_app.errors import EngineFailed
from serve_app.queueing.line import HeldLease
from serve_app.queueing.pool import QueuedPool
from serve_app.queueing.ticket import Ticket

# Between the tries: a dead replica is known as such within the first health check at the latest.
_PAUSES_S = (0.05, 0.1, 0.2, 0.4)
# For a try while unwanted leases are held, which may be all that there is.
_TRY_TIMEOUT_S = 2.0


async def open_elsewhere(pool: QueuedPool, ticket: Ticket) -> HeldLease:
    """Return a lease at another replica than the one to avoid; if cancelled, nothing stays held.

    The pool places a lease as it likes. One at the unwanted replica is kept until the next is
    there: it makes that replica look the busier one.

    Raises:
        EngineFailed: there was no other replica.
        ModelOverloaded, ModelNotReady: see `QueuedPool.open`.
    """
    unwanted: list[HeldLease] = []
    try:
        for pause_s in _PAUSES_S:
            timeout_s = _TRY_TIMEOUT_S if unwanted else None
            async with asyncio.timeout(timeout_s):
                lease = await pool.open(ticket)
            if lease.grant.replica_id != ticket.hint.avoid:
                return lease
            unwanted.append(lease)
            await asyncio.sleep(pause_s)
        raise EngineFailed
    except TimeoutError:
        raise EngineFailed from None
    finally:
        for lease in unwanted:
            lease.close()
