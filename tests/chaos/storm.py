"""Kills at random moments under load."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.chaos.load import Load, Seen, Wishes
from tests.chaos.victims import kill_one
from tests.stack_runner import RunningStack

# The next kill does not wait for the stack to be whole again.
_LONGEST_PAUSE_S = 12.0
_NOBODY_THERE_S = 0.2
_BACK_S = 120.0


@dataclass
class Storm:
    """What was done to a stack, and what its clients saw meanwhile."""

    kills: Counter[str] = field(default_factory=Counter)
    # By the monotonic clock.
    gateway_kills_s: list[float] = field(default_factory=list)
    seen: Seen = field(default_factory=Seen)

    def note_kill(self, victim: str) -> None:
        """Remember that one of `victim` was just killed."""
        self.kills[victim] += 1
        if victim == "gateway":
            self.gateway_kills_s.append(time.monotonic())


async def rage(
    stack: RunningStack,
    victims: Sequence[str],
    rng: random.Random,
    wishes: Wishes,
    *,
    between: int,
    at_the_end: int,
    in_all: int = 0,
) -> Storm:
    """Kill one of each of `victims` in their order while clients ask; return what happened.

    Args:
        between: mean number of answers from one kill to the next.
        at_the_end: answers that must still come after the last.
        in_all: answers that must have come at the end; what the kills kept from coming is made up.
    """
    load = Load(stack.url, stack.bootstrap, wishes, seed=rng.randrange(2**32))
    storm = Storm(seen=load.seen)
    running = asyncio.create_task(load.run())
    try:
        for victim in victims:
            await _pause(load, rng, between)
            await _kill(stack, victim, rng)
            storm.note_kill(victim)
        await load.completed(max(at_the_end, in_all - len(load.seen.completed)))
    finally:
        load.stop()
        await running
    return storm


async def _kill(stack: RunningStack, victim: str, rng: random.Random) -> None:
    async with asyncio.timeout(_BACK_S):
        # It may just be away, of the kill before.
        while not await asyncio.to_thread(kill_one, stack, victim, rng):  # noqa: ASYNC110
            await asyncio.sleep(_NOBODY_THERE_S)


async def _pause(load: Load, rng: random.Random, between: int) -> None:
    """Wait for a random number of answers, or for a random time where they do not come."""
    answers, seconds = rng.randint(0, 2 * between), rng.uniform(1, _LONGEST_PAUSE_S)
    try:
        await load.completed(answers, timeout_s=seconds)
    except TimeoutError:
        return
    await asyncio.sleep(rng.uniform(0, 0.05))
