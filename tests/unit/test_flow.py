"""Bytes that tell when they are let go."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading

import pytest

from serve_app.completions.flow import Flow


async def nothing() -> None:
    """Nudge somebody who needs no nudge."""


async def test_what_somebody_holds_is_counted() -> None:
    flow = Flow(100)
    queue = [flow.part(b"x" * 60), flow.part(b"y" * 30)]
    assert flow.held_bytes == 90
    queue.pop()
    assert flow.held_bytes == 60
    queue.pop()
    assert flow.held_bytes == 0


async def test_a_part_is_plain_bytes_to_everybody_else() -> None:
    part = Flow(1).part(b"data: 1\n\n")
    assert part == b"data: 1\n\n"
    for other in (pickle.loads(pickle.dumps(part)), copy.copy(part), bytes(part)):
        assert type(other) is bytes
        assert other == part


async def test_room_is_there_while_little_is_held() -> None:
    flow = Flow(10)
    part = flow.part(b"x" * 10)
    await flow.room(0.001, nothing)
    assert part


async def test_room_is_waited_for() -> None:
    flow = Flow(10)
    queue = [flow.part(b"x" * 10), flow.part(b"x" * 10)]
    waiting = [asyncio.create_task(flow.room(20, nothing)) for _ in range(2)]
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    # As Serve does it: in another thread.
    letting_go = threading.Thread(target=queue.pop)
    letting_go.start()
    letting_go.join()
    await asyncio.gather(*waiting)
    assert flow.held_bytes == 10


async def test_nothing_that_moves_is_a_timeout() -> None:
    flow = Flow(10)
    queue = [flow.part(b"x" * 20)]
    with pytest.raises(TimeoutError):
        await flow.room(0.001, nothing)
    queue.clear()
    await flow.room(0.001, nothing)


async def test_somebody_who_keeps_the_last_part_is_nudged() -> None:
    flow = Flow(10)
    last = [flow.part(b"x" * 20)]
    nudges = 0

    async def nudge() -> None:
        nonlocal nudges
        nudges += 1
        if nudges == 3:
            last.clear()

    await flow.room(20, nudge)
    assert nudges == 3
