"""The clock of a request: when each stage of its path began and ended.

Server-Timing, the record and the spans of a trace are all read from this one clock.
"""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "server-timing"


class Stage(enum.StrEnum):
    """A stage of the request path; the value is the name of its span."""

    ADMIT = "admit"
    AUTHENTICATE = "authenticate"
    AUTHORIZE = "authorize"
    RESERVE = "reserve"
    LEASE = "lease"
    RELAY = "relay"
    SETTLE = "settle"
    RECORD = "record"


class Lap:
    """One pass of a stage: the block of a `with`, in seconds of `time.perf_counter`."""

    __slots__ = ("begun_s", "ended_s", "failed", "span_id", "stage")

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.begun_s = time.perf_counter()
        self.ended_s: float | None = None
        # Also where it was cancelled.
        self.failed = False
        # Made where something elsewhere hangs its spans below this one.
        self.span_id: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.ended_s = time.perf_counter()
        self.failed = kind is not None


class _Untimed(Lap):
    """A block that nobody asks the time of."""

    __slots__ = ()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        return


UNTIMED = _Untimed(Stage.ADMIT)


@dataclass(slots=True)
class Timings:
    """The laps of one request, in the order in which they began, and its first token."""

    laps: list[Lap] = field(default_factory=list)
    time_to_first_token_s: float | None = None

    def lap(self, stage: Stage) -> Lap:
        """Return a block that times a pass of `stage`."""
        lap = Lap(stage)
        self.laps.append(lap)
        return lap

    @property
    def auth_s(self) -> float | None:
        """Seconds to authenticate, or None where the request did not come that far."""
        return self._spent_s(Stage.AUTHENTICATE)

    @property
    def limits_s(self) -> float | None:
        """Seconds to reserve."""
        return self._spent_s(Stage.RESERVE)

    @property
    def queue_s(self) -> float | None:
        """Seconds that it waited for a replica; a request that is asked twice waits twice."""
        return self._spent_s(Stage.LEASE)

    def _spent_s(self, stage: Stage) -> float | None:
        spent_s: float | None = None
        for lap in self.laps:
            if lap.stage is stage and lap.ended_s is not None:
                spent_s = (spent_s or 0.0) + lap.ended_s - lap.begun_s
        return spent_s

    def server_timing(self, total_s: float | None = None) -> str:
        """Return the Server-Timing header (https://www.w3.org/TR/server-timing/)."""
        steps = (
            ("auth", self.auth_s),
            ("limits", self.limits_s),
            ("queue", self.queue_s),
            ("ttft", self.time_to_first_token_s),
            ("total", total_s),
        )
        return ", ".join(f"{name};dur={s * 1000:.2f}" for name, s in steps if s is not None)


def total(seconds: float) -> str:
    """Return the header's value for the whole time."""
    return f"total;dur={seconds * 1000:.2f}"


class TotalTiming:
    """ASGI middleware: says the total on answers that no stage of the path has timed."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        begun_s = time.perf_counter()

        async def timed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault(HEADER, total(time.perf_counter() - begun_s))
            await send(message)

        await self._app(scope, receive, timed)
