"""The comparison of gateways, against the fake engine alone: what its client and judge see."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from load_tests.bench import scenarios
from load_tests.bench.asking import AnswerCut, Door, Question, ask, client, keep_asking
from load_tests.bench.report import Findings, markdown
from load_tests.bench.systems import Speed, System, bare_fake
from tests.serve_configs import FAKE_MODEL

SPEED = Speed(time_to_first_token_s=0.05, time_per_token_s=0.01)
TOKENS = 6
QUESTION = Question(model=FAKE_MODEL, tokens=TOKENS)


@pytest.fixture(scope="module")
def engine() -> Iterator[System]:
    with bare_fake(SPEED) as running:
        yield running


async def test_each_token_is_timed(engine: System) -> None:
    async with client() as http:
        answer = await ask(http, engine.door, QUESTION)
    assert (answer.frames, len(answer.gaps_s)) == (TOKENS, TOKENS - 1)
    assert answer.first_s >= SPEED.time_to_first_token_s
    assert answer.took_s >= SPEED.time_to_first_token_s + (TOKENS - 1) * SPEED.time_per_token_s


async def test_answer_that_is_not_streamed_has_no_tokens_to_time(engine: System) -> None:
    whole = Question(model=FAKE_MODEL, tokens=TOKENS, stream=False)
    seen = await keep_asking(engine.door, whole, clients=3, answers=7)
    assert [(answer.frames, answer.gaps_s) for answer in seen] == [(0, [])] * 7


async def test_stream_without_its_end_is_no_answer() -> None:
    async def cut(_: object, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\ndata: {}\n\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(cut, "127.0.0.1", 0)
    door = Door(url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    async with server, client() as http:
        with pytest.raises(AnswerCut):
            await ask(http, door, QUESTION)


async def test_figures_of_a_system_that_is_the_bare_engine_itself(engine: System) -> None:
    twin = System("twin", engine.door, engine.processes)
    findings = Findings(engine="fake", load_before=0.0)
    findings.latencies = await scenarios.one_client([engine, twin], QUESTION, rounds=4)
    findings.throughputs["4 clients"] = await scenarios.many_clients(
        [engine, twin], QUESTION, clients=4, answers=8, rounds=2
    )
    findings.held = await scenarios.many_streams(
        [twin], QUESTION, streams=5, ramp_s=0.05, gap_s=0.5
    )
    assert findings.latencies[0].added_ttft_p50_ms == 0
    assert [one.system for one in findings.throughputs["4 clients"]].count("twin") == 2
    assert (findings.held[0].completed, findings.held[0].stalled) == (5, 0)
    page = markdown(findings, None)
    assert page.count("| twin |") == 3
