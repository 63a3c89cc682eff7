"""Runs batches beside the requests of clients, at the standing that the policy gives to batches.

Every gateway has a runner. Nothing that matters is in its memory: a line is taken under a claim
that ends by itself, and its result is written only by who still holds the claim.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from serve_app.batches.batch import Line, LineState, Status
from serve_app.batches.house import House
from serve_app.batches.metrics import BatchMetrics, NoBatchMetrics
from serve_app.batches.rotation import Rotation
from serve_app.batches.verdict import (
    DESTROYED,
    REVOKED,
    Finished,
    Postponed,
    Verdict,
    backoff_s,
    judge,
)
from serve_app.batches.work import BatchWork
from serve_app.completions.gateway import Gateway
from serve_app.completions.kinds import Kind
from serve_app.completions.parts import OnBehalf
from serve_app.errors import Unavailable
from serve_app.lazy_pool import LazyPool
from serve_app.log_setup import log_failure

logger = logging.getLogger(__name__)

_ERROR = {"action": "batch_error"}

_OPEN = (Status.VALIDATING, Status.IN_PROGRESS, Status.FINALIZING, Status.CANCELLING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """How often a runner does what, in seconds."""

    look_s: float = 5.0
    claim_s: float = 30.0
    drain_s: float = 10.0
    # A pause of a batch may end before the next look.
    feed_s: float = 1.0


class BatchRunner:
    """Runs the lines of batches through `gateway`.

    Args:
        pool: for what it reads and writes of batches. It is not the gateway's own, whose
            connections are for the requests of users.
    """

    def __init__(
        self,
        gateway: Gateway,
        pool: LazyPool,
        metrics: BatchMetrics | None = None,
        pulse: Pulse | None = None,
    ) -> None:
        self._gateway = gateway
        self._pool = pool
        self._metrics = metrics or NoBatchMetrics()
        self._pulse = pulse or Pulse()
        self._work = BatchWork(pool, gateway.parts.vault)
        self._house = House(pool, gateway.parts.vault)
        self._rotation = Rotation()
        self._held: dict[uuid.UUID, tuple[Line, asyncio.Task[None]]] = {}
        self._change = asyncio.Event()
        self._loops: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin; PostgreSQL may be away."""
        if not self._loops:
            self._loops = [
                asyncio.create_task(_for_ever(loop), name=f"batches-{loop.__name__}")
                for loop in (self._renew, self._look, self._feed)
            ]

    async def close(self) -> None:
        """Take no more lines, let those that run end for a while, and give up the rest.

        Closes the pool, too.
        """
        renewing, working = self._loops[:1], self._loops[1:]
        self._loops = []
        await _cancel(working)
        if running := [task for _, task in self._held.values()]:
            _, late = await asyncio.wait(running, timeout=self._pulse.drain_s)
            await _cancel(late)
        await _cancel(renewing)
        await self._pool.close()

    # The three loops.

    async def _look(self) -> None:
        """See which batches there are, and take the steps that they need as a whole."""
        while True:
            if not await self._look_once():
                await asyncio.sleep(self._pulse.look_s)

    async def _look_once(self) -> bool:
        """Return whether a batch began, so that there is more to see at once."""
        config = self._gateway.config
        batches = await self._work.open()
        counts = Counter(batch.status for batch in batches)
        self._metrics.batches_open({status: counts[status] for status in _OPEN})
        running = [batch for batch in batches if batch.status is Status.IN_PROGRESS]
        self._rotation.refresh(running, max(1, config.batches.concurrency))
        self._change.set()
        if config.batches.concurrency == 0:
            return False
        return any([await self._house.tend(batch, config) for batch in batches])

    async def _feed(self) -> None:
        """Keep as many lines running as the policy allows."""
        while True:
            self._change.clear()
            while len(self._held) < self._gateway.config.batches.concurrency:
                if not await self._start_line():
                    break
            # Without batches there is nothing to wake up for but the next look.
            timeout_s = self._pulse.feed_s if len(self._rotation) else None
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._change.wait()

    async def _start_line(self) -> bool:
        """Take a line and run it; False where there is none."""
        batch = self._rotation.next()
        if batch is None:
            return False
        line = await self._work.claim(batch, self._pulse.claim_s)
        if line is None:
            self._rotation.dry(batch.id)
            return True
        self._rotation.started(batch.id)
        task = asyncio.create_task(self._run(line), name=f"batch-line-{line.request_id}")
        self._held[line.claim] = (line, task)
        task.add_done_callback(lambda done: self._ended(line, done))
        return True

    async def _renew(self) -> None:
        """Hold on to the lines that run, and give up those that are not ours any more."""
        while True:
            await asyncio.sleep(self._pulse.claim_s / 3)
            held = dict(self._held)
            if not held:
                continue
            lines = [line for line, _ in held.values()]
            kept = await self._work.renew(lines, self._pulse.claim_s)
            for claim in held.keys() - kept:
                held[claim][1].cancel()

    # One line.

    async def _run(self, line: Line) -> None:
        pause_s: float | None = None
        try:
            verdict = await self._verdict(line)
            if isinstance(verdict, Postponed):
                pause_s = verdict.delay_s
            written = await self._write(line, verdict)
            self._metrics.line_ended(_result(verdict) if written else "lost")
        except asyncio.CancelledError:
            with suppress(Unavailable):
                await self._work.give_up(line)
            raise
        finally:
            self._rotation.ended(line.batch.id, pause_s=pause_s)

    async def _verdict(self, line: Line) -> Verdict:
        if line.revoked:
            return REVOKED
        if line.body is None:
            return DESTROYED
        standing = self._gateway.config.standings.batch
        on_behalf = OnBehalf(principal=line.batch.principal, standing=standing)
        answered = await self._gateway.answer_for(
            on_behalf, Kind(line.batch.endpoint), line.body, line.request_id
        )
        return judge(line, answered)

    async def _write(self, line: Line, verdict: Verdict) -> bool:
        """Write until it is written: the answer was made and paid for."""
        times = 0
        while True:
            try:
                if isinstance(verdict, Finished):
                    return await self._work.finish(line, verdict)
                return await self._work.postpone(line, verdict)
            except Unavailable:
                await asyncio.sleep(backoff_s(times))
                times += 1

    def _ended(self, line: Line, task: asyncio.Task[None]) -> None:
        self._held.pop(line.claim, None)
        self._change.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            # Its claim ends by itself, and then the line is taken again.
            log_failure(logger, "a line of a batch", error, _ERROR)


def _result(verdict: Verdict) -> str:
    if isinstance(verdict, Postponed):
        return "postponed"
    return LineState(verdict.state).value


async def _for_ever(loop: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run `loop` again, a little later, whenever it fails: PostgreSQL may be away for hours."""
    failures = 0
    while True:
        task = asyncio.create_task(loop(), name=loop.__name__)
        begun_s = asyncio.get_running_loop().time()
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            await _cancel([task])
            raise
        if (error := task.exception()) is not None and not isinstance(error, Unavailable):
            log_failure(logger, "a loop of the batches", error, _ERROR)
        long = asyncio.get_running_loop().time() - begun_s > 60
        failures = 0 if long else failures + 1
        await asyncio.sleep(min(backoff_s(failures) / 2, 10.0))


async def _cancel(tasks: Any) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
