"""An engine that batches continuously, as a fluid: no step is simulated, only their rates.

A step takes a base time, a time for each sequence in it, and the time for its chunk of a prompt.
While there are prompts to read, every sequence gets its next token at the pace of such longer
steps: so a first token waits for the prompts before it, and answers slow down meanwhile.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from load_tests.autoscaling.trace import Request
from serve_app.engine_counters import EngineCounters
from serve_app.scaling.readings import FirstTokens, LoadReadings


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Assumed of a model with some 30 billion parameters on one GPU with 80 GB."""

    prompt_tokens_per_s: float = 3000.0
    step_s: float = 0.030
    sequence_s: float = 0.0003
    chunk_tokens: int = 2048
    sequences: int = 128

    @property
    def chunk_s(self) -> float:
        """How much longer a step takes that reads a part of a prompt."""
        return self.chunk_tokens / self.prompt_tokens_per_s


@dataclass(slots=True, eq=False)
class Job:
    """A request in the simulation, and when what happened to it."""

    request: Request
    routed_at_s: float = math.nan
    begun_at_s: float = math.nan
    first_token_at_s: float = math.nan


@dataclass(eq=False)
class Replica:
    """One replica; the caller moves its time with `advance`."""

    speed: Speed
    clock_s: Callable[[], float]
    asked_at_s: float
    ready_at_s: float
    stopping: bool = False
    version: int = 0
    _at_s: float = 0.0
    _tokens_each: float = 0.0  # how many tokens a sequence got that runs since the start
    _prompts: deque[Job] = field(default_factory=deque)
    _left_tokens: float = 0.0  # of the first prompt
    _answers: list[tuple[float, int, Job]] = field(default_factory=list)
    _prompt_tokens: int = 0
    _answer_tokens: float = 0.0

    def __post_init__(self) -> None:
        self._order = itertools.count()
        self._at_s = self.ready_at_s
        self._first_tokens = FirstTokens(self.clock_s)
        self._load = LoadReadings(self._first_tokens, self.clock_s)
        self._pace()

    @property
    def ongoing(self) -> int:
        """Requests that are here."""
        return len(self._prompts) + len(self._answers)

    def take(self, job: Job) -> None:
        """Take a request in; time must have been moved to now."""
        job.routed_at_s = self._at_s
        self._prompts.append(job)
        self._pace()
        self._begin_first()

    def read(self) -> dict[str, float]:
        """Return what this replica tells the autoscaler now."""
        return self._load.read(
            EngineCounters(
                prompt_tokens=self._prompt_tokens,
                completion_tokens=int(self._answer_tokens),
                requests_waiting=len(self._prompts) - int(self._reads),
            )
        )

    def advance(self, to_s: float) -> None:
        """Let time pass, in which nothing ends before `to_s`."""
        passed_s, self._at_s = to_s - self._at_s, to_s
        step_s = self._step_s
        self._tokens_each += passed_s / step_s
        self._answer_tokens += len(self._answers) * passed_s / step_s
        if self._reads:
            self._left_tokens -= passed_s * self.speed.chunk_tokens / step_s

    def next_s(self) -> float:
        """Return when the next prompt is read or the next answer ends."""
        step_s = self._step_s
        at_s = math.inf
        if self._reads:
            at_s = self._at_s + self._left_tokens * step_s / self.speed.chunk_tokens
        if self._answers:
            at_s = min(at_s, self._at_s + (self._answers[0][0] - self._tokens_each) * step_s)
        return max(at_s, self._at_s)

    def settle(self) -> list[Job]:
        """Move what has ended by now; return those that got their first token."""
        begun = []
        if self._reads and self._left_tokens <= 1e-6:
            begun.append(self._answer_first())
        while self._answers and self._answers[0][0] <= self._tokens_each + 1e-6:
            heapq.heappop(self._answers)
        self._pace()
        self._begin_first()
        return begun

    def _pace(self) -> None:
        speed = self.speed
        self._reads = bool(self._prompts) and len(self._answers) < speed.sequences
        self._step_s = speed.step_s + speed.sequence_s * len(self._answers)
        if self._reads:
            self._step_s += speed.chunk_s

    def _begin_first(self) -> None:
        if self._reads and math.isnan((first := self._prompts[0]).begun_at_s):
            first.begun_at_s = self._at_s
            self._left_tokens = float(first.request.prompt_tokens)

    def _answer_first(self) -> Job:
        job = self._prompts.popleft()
        job.first_token_at_s = self._at_s
        self._prompt_tokens += job.request.prompt_tokens
        self._first_tokens.note(self._at_s - job.routed_at_s)
        ends = self._tokens_each + job.request.answer_tokens - 1
        heapq.heappush(self._answers, (ends, next(self._order), job))
        return job
