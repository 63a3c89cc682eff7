"""The bound on each write of a stream."""

from __future__ import annotations

import asyncio

import pytest

from serve_app.completions.patience import Patience


async def test_a_block_that_takes_too_long_is_ended() -> None:
    patience = Patience(0.05)
    with pytest.raises(TimeoutError), patience:
        await asyncio.Event().wait()
    # The task goes on as if nothing had been, and the next block has its whole time.
    assert not _cancelling()
    with patience:
        await asyncio.sleep(0.001)


async def test_each_block_has_its_own_time() -> None:
    patience = Patience(0.2)
    for _ in range(6):
        with patience:
            await asyncio.sleep(0.05)


async def test_time_between_blocks_does_not_count() -> None:
    patience = Patience(0.05)
    with patience:
        pass
    await asyncio.sleep(0.1)
    with patience:
        await asyncio.sleep(0)


async def test_many_blocks_share_one_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    patience = Patience(60)
    loop = asyncio.get_running_loop()
    timers: list[float] = []
    call_later = loop.call_later

    def counted(delay: float, *args: object, **kwargs: object) -> asyncio.TimerHandle:
        timers.append(delay)
        return call_later(delay, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "call_later", counted)
    for _ in range(100):
        with patience:
            await asyncio.sleep(0)
    assert timers == [60]
    patience.close()


async def test_who_is_cancelled_from_outside_is_cancelled() -> None:
    patience = Patience(60)
    inside = asyncio.Event()

    async def work() -> None:
        with patience:
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    patience.close()


async def test_who_is_cancelled_from_outside_too_is_cancelled() -> None:
    patience = Patience(0.05)
    inside = asyncio.Event()

    async def work() -> None:
        with patience:
            inside.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                # It comes while the block is being left for its time.
                task.cancel()
                raise

    task = asyncio.create_task(work())
    await inside.wait()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_what_a_block_raises_passes() -> None:
    patience = Patience(60)
    with pytest.raises(ValueError, match="mine"), patience:
        raise ValueError("mine")
    patience.close()


def _cancelling() -> int:
    task = asyncio.current_task()
    assert task is not None
    return task.cancelling()
