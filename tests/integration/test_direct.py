"""Direct calls over real connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest

from serve_app.contracts import Allowance, Limit, Reason, Refusal, Window
from serve_app.direct import DirectLine, DirectServer, Door, LineLost, Procedure, line
from serve_app.errors import LimitsUnavailable
from serve_app.limits.procedures import Allowed


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the tests send."""

    text: str
    wait: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Newer:
    """What a newer release sends."""

    text: str
    more: int


ECHO = Procedure(7, Asked, str)


class Echo:
    """Answers with the text; waits for the gate where it is asked to."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.came = asyncio.Event()
        self.done: list[str] = []

    async def __call__(self, asked: Asked) -> str:
        self.came.set()
        if asked.text == "fail":
            raise RuntimeError(asked.text.upper())
        if asked.wait:
            await self.gate.wait()
        self.done.append(asked.text)
        return asked.text


class Served:
    """A server that can be replaced, and where the line is led to it."""

    def __init__(self) -> None:
        self.echo = Echo()
        self.door: Door | None = None
        self.server: DirectServer | None = None
        self.looked = asyncio.Event()

    async def start(self) -> None:
        self.server = DirectServer({ECHO.code: ECHO.served_by(self.echo)}, "127.0.0.1")
        self.door = await self.server.start()

    async def stop(self) -> None:
        assert self.server is not None
        self.door = None
        await self.server.close()

    async def find(self) -> Door:
        self.looked.set()
        if self.door is None:
            raise LineLost("nowhere")
        return self.door


@asynccontextmanager
async def connected(served: Served) -> AsyncIterator[DirectLine]:
    found = DirectLine(served.find)
    found.start()
    try:
        yield found
    finally:
        await found.close()


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    served = Served()
    await served.start()
    yield served
    served.echo.gate.set()
    await served.stop()


async def answered(found: DirectLine, asked: Asked) -> str:
    """Ask until there is a connection."""
    async with asyncio.timeout(20):
        while True:
            try:
                return await found.call(ECHO, asked)
            except LineLost:
                await asyncio.sleep(0.01)


async def test_many_calls_share_a_connection_and_overtake_each_other(served: Served) -> None:
    async with connected(served) as found:
        assert await answered(found, Asked(text="first")) == "first"
        slow = asyncio.create_task(found.call(ECHO, Asked(text="slow", wait=True)))
        large = "x" * 3_000_000
        texts = [large, *map(str, range(200))]
        got = await asyncio.gather(*(found.call(ECHO, Asked(text=text)) for text in texts))
        assert got == texts
        assert not slow.done()
        served.echo.gate.set()
        assert await slow == "slow"


async def test_who_has_another_token_is_not_let_in(served: Served) -> None:
    assert served.door is not None
    served.door = replace(served.door, token=b"\0" * 32)
    async with connected(served) as found:
        await served.looked.wait()
        for _ in range(20):
            with pytest.raises(LineLost):
                await found.call(ECHO, Asked(text="no"))
            await asyncio.sleep(0.01)
    assert served.echo.done == []
    assert "token" not in repr(served.door)


async def test_what_fails_over_there_fails_alone_and_tells_nothing(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(served) as found:
        await answered(found, Asked(text="first"))
        other = asyncio.create_task(found.call(ECHO, Asked(text="other", wait=True)))
        with pytest.raises(LineLost, match="failed"):
            await found.call(ECHO, Asked(text="fail"))
        served.echo.gate.set()
        assert await other == "other"
    assert "RuntimeError" in caplog.text
    assert "FAIL" not in caplog.text


async def test_who_stops_answers_first_and_the_line_finds_who_follows(served: Served) -> None:
    async with connected(served) as found:
        await answered(found, Asked(text="first"))
        served.echo.came.clear()
        under_way = asyncio.create_task(found.call(ECHO, Asked(text="under way", wait=True)))
        await served.echo.came.wait()
        stopping = asyncio.create_task(served.stop())
        await asyncio.sleep(0)
        served.echo.gate.set()
        assert await under_way == "under way"
        await stopping
        with pytest.raises(LineLost):
            await found.call(ECHO, Asked(text="nobody is there"))
        await served.start()
        assert await answered(found, Asked(text="the next")) == "the next"


async def test_a_call_whose_caller_has_gone_is_done_and_disturbs_no_other(served: Served) -> None:
    async with connected(served) as found:
        await answered(found, Asked(text="first"))
        served.echo.came.clear()
        leaving = asyncio.create_task(found.call(ECHO, Asked(text="left", wait=True)))
        await served.echo.came.wait()
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        served.echo.gate.set()
        assert await found.call(ECHO, Asked(text="second")) == "second"
    assert served.echo.done == ["first", "left", "second"]


async def test_a_connection_that_says_nothing_is_given_up_with_all_its_calls(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected(served) as found:
        await answered(found, Asked(text="first"))
        patient = asyncio.create_task(found.call(ECHO, Asked(text="patient", wait=True)))
        await asyncio.sleep(0)
        monkeypatch.setattr(line, "_ANSWER_TIMEOUT_S", 0.05)
        with pytest.raises(LineLost, match="no answer"):
            await found.call(ECHO, Asked(text="silence", wait=True))
        with pytest.raises(LineLost):
            await patient
        monkeypatch.undo()
        assert await answered(found, Asked(text="again")) == "again"


async def test_a_cut_connection_fails_what_is_under_way(served: Served) -> None:
    connected_to = asyncio.Event()

    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected_to.set()
        await reader.readexactly(32 + 13)
        writer.transport.abort()

    server = await asyncio.start_server(cut, "127.0.0.1")
    async with server:
        assert served.door is not None
        served.door = replace(served.door, port=server.sockets[0].getsockname()[1])
        async with connected(served) as found:
            await connected_to.wait()
            with pytest.raises(LineLost, match="failed"):
                await found.call(ECHO, Asked(text="cut"))


async def test_the_line_moves_to_another_door_and_the_calls_on_the_old_one_are_answered(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line, "_LOOK_EVERY_S", 0.05)
    async with connected(served) as found:
        await answered(found, Asked(text="first"))
        served.echo.came.clear()
        old = asyncio.create_task(found.call(ECHO, Asked(text="old", wait=True)))
        await served.echo.came.wait()
        other = Served()
        await other.start()
        served.door, before = other.door, served.door
        async with asyncio.timeout(20):
            while not other.echo.done:
                assert await found.call(ECHO, Asked(text="new")) == "new"
        served.echo.gate.set()
        assert await old == "old"
        served.door = before
        await other.stop()


async def test_fields_that_the_other_side_does_not_know_are_passed_over(served: Served) -> None:
    newer = Procedure(ECHO.code, Newer, str)
    async with connected(served) as found:
        await answered(found, Asked(text="first"))
        assert await found.call(newer, Newer(text="known", more=1)) == "known"


@pytest.mark.parametrize(
    "answer",
    [
        Allowance(requests=Window(limit=10, remaining=3, reset_s=1.5)),
        Allowance(
            refusal=Refusal(
                reason=Reason.SPENT,
                limit=Limit.COST_PER_DAY,
                label="you",
                allowed=5,
                asked=4,
                left=3,
                retry_after_s=2.5,
            )
        ),
    ],
)
async def test_what_the_limits_answer_arrives_as_it_was(answer: Allowance) -> None:
    procedure = Procedure(1, Allowed, Allowed)

    async def back(asked: Allowed) -> Allowed:
        return asked

    sent = procedure.call(Allowed.of(answer))
    received = procedure.answer(await procedure.served_by(back)(sent))
    assert received.answer == answer


def test_that_the_limits_are_unavailable_arrives_with_its_time() -> None:
    procedure = Procedure(1, Allowed, Allowed)
    received = procedure.answer(procedure.call(Allowed.of(LimitsUnavailable(retry_after_s=5))))
    assert isinstance(received.answer, LimitsUnavailable)
    assert received.answer.retry_after_s == 5
