"""One day of one model: requests, replicas that come and go, and who decides on them."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from dataclasses import dataclass, field
from random import Random

from load_tests.autoscaling.engine import Job, Replica, Speed
from load_tests.autoscaling.policies import LOOK_BACK_S, Controller, Figures
from load_tests.autoscaling.trace import DAY_S, Request

# Ray samples about so often and tells its controller every ten seconds; it decides more often,
# but knows nothing new then.
_DECIDE_EVERY_S = 5.0
_TELL_EVERY_S = 10.0
_MAX_ONGOING = 256


@dataclass(kw_only=True)
class Day:
    """What came of a day."""

    jobs: list[Job]
    replica_hours: float
    # Replicas that are paid for, at each decision.
    replicas: list[int] = field(default_factory=list)
    decide_every_s: float = _DECIDE_EVERY_S

    @property
    def waits_s(self) -> list[float]:
        """From coming to being begun."""
        return [job.begun_at_s - job.request.at_s for job in self.jobs]

    @property
    def first_tokens_s(self) -> list[float]:
        """From coming to the first token."""
        return [job.first_token_at_s - job.request.at_s for job in self.jobs]


class Simulation:
    """Runs a trace against a controller."""

    def __init__(
        self, requests: list[Request], controller: Controller, start_s: float, seed: int
    ) -> None:
        self._jobs = [Job(request) for request in requests]
        self._controller = controller
        self._start_s = start_s
        self._rng = Random(seed)
        self._now_s = 0.0
        self._queue: deque[Job] = deque()
        self._replicas: list[Replica] = []
        self._gone_hours = 0.0
        self._events: list[tuple[float, int, Replica, int]] = []
        self._order = itertools.count()
        self._samples: deque[tuple[float, float, dict[Replica, dict[str, float]]]] = deque(
            maxlen=int(LOOK_BACK_S / _DECIDE_EVERY_S)
        )
        self._known = Figures(running=0, target=0, ongoing=0, queued=0, told={})

    def run(self) -> Day:
        """Run until all requests have their first token."""
        self._replicas = [self._replica(ready_in_s=0.0)]
        day = Day(jobs=self._jobs, replica_hours=0.0)
        arrivals, left = deque(self._jobs), len(self._jobs)
        tick = 0
        while left or self._now_s < DAY_S:
            tick_s = tick * _DECIDE_EVERY_S
            arrival_s = arrivals[0].request.at_s if arrivals else math.inf
            event_s = self._events[0][0] if self._events else math.inf
            self._now_s = min(tick_s, arrival_s, event_s)
            if event_s == self._now_s:
                left -= self._on_event()
            elif arrival_s == self._now_s:
                self._queue.append(arrivals.popleft())
                self._route()
            else:
                self._on_tick(tick)
                day.replicas.append(len(self._replicas))
                tick += 1
        hours = sum(self._now_s - one.asked_at_s for one in self._replicas) / 3600
        day.replica_hours = self._gone_hours + hours
        return day

    # Requests.

    def _on_event(self) -> int:
        _, _, replica, version = heapq.heappop(self._events)
        if version != replica.version:
            return 0
        replica.advance(self._now_s)
        begun = len(replica.settle())
        self._expect(replica)
        if replica.stopping and not replica.ongoing:
            self._remove(replica)
        self._route()
        return begun

    def _route(self) -> None:
        """Send who waits to the emptier of two replicas, as Ray's router does."""
        while self._queue:
            ready = [one for one in self._replicas if self._open(one)]
            if not ready:
                return
            two = self._rng.sample(ready, min(2, len(ready)))
            replica = min(two, key=lambda one: one.ongoing)
            replica.advance(self._now_s)
            replica.take(self._queue.popleft())
            self._expect(replica)

    def _open(self, replica: Replica) -> bool:
        ready = replica.ready_at_s <= self._now_s and not replica.stopping
        return ready and replica.ongoing < _MAX_ONGOING

    def _expect(self, replica: Replica) -> None:
        replica.version += 1
        if (at_s := replica.next_s()) < math.inf:
            event = (at_s, next(self._order), replica, replica.version)
            heapq.heappush(self._events, event)

    # Replicas.

    def _on_tick(self, tick: int) -> None:
        self._route()
        self._sample()
        if tick % int(_TELL_EVERY_S / _DECIDE_EVERY_S) == 0:
            self._tell()
        staying = [one for one in self._replicas if not one.stopping]
        running = sum(one.ready_at_s <= self._now_s for one in staying)
        known = self._known
        figures = Figures(
            running=running,
            target=len(staying),
            ongoing=known.ongoing,
            queued=known.queued,
            told=known.told,
        )
        self._aim_at(self._controller.decide(self._now_s, figures), staying)

    def _sample(self) -> None:
        staying = [one for one in self._replicas if not one.stopping]
        ready = [one for one in staying if one.ready_at_s <= self._now_s]
        queued = len(self._queue)
        ongoing = queued + sum(one.ongoing for one in ready)
        for one in ready:
            one.advance(self._now_s)
            self._expect(one)
        self._samples.append((ongoing, queued, {one: one.read() for one in ready}))

    def _tell(self) -> None:
        samples = list(self._samples)
        told: dict[str, dict[str, float]] = {}
        for one in samples[-1][2]:
            figures = [sample[2][one] for sample in samples if one in sample[2]]
            for name in figures[0]:
                mean = sum(each[name] for each in figures) / len(figures)
                told.setdefault(name, {})[str(id(one))] = mean
        self._known = Figures(
            running=0,
            target=0,
            ongoing=sum(sample[0] for sample in samples) / len(samples),
            queued=sum(sample[1] for sample in samples) / len(samples),
            told=told,
        )

    def _aim_at(self, target: int, staying: list[Replica]) -> None:
        for _ in range(target - len(staying)):
            start_s = self._start_s * self._rng.uniform(0.75, 1.25)
            self._replicas.append(self._replica(ready_in_s=start_s))
        # Ray stops those first that do not run yet.
        staying.sort(key=lambda one: (one.ready_at_s <= self._now_s, one.ongoing))
        for one in staying[: max(0, len(staying) - target)]:
            one.stopping = True
            if not one.ongoing:
                self._remove(one)

    def _replica(self, ready_in_s: float) -> Replica:
        return Replica(
            speed=Speed(),
            clock_s=lambda: self._now_s,
            asked_at_s=self._now_s,
            ready_at_s=self._now_s + ready_in_s,
        )

    def _remove(self, replica: Replica) -> None:
        self._gone_hours += (self._now_s - replica.asked_at_s) / 3600
        self._replicas.remove(replica)
