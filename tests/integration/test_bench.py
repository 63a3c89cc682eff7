"""The comparison of gateways, against the fake engine alone: what its client and judge see."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from load_tests.bench import scenarios
from load_tests.bench.asking import Answer, AnswerCut, Door, Question, ask, client, keep_asking
from load_tests.bench.report import Findings, markdown
from load_tests.bench.systems import Speed, System, bare_fake
from load_tests.bench.variant import without_paths
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
    assert answer.frames == TOKENS
    # On a busy machine some come in one piece.
    assert 0 < len(answer.gaps_s) < TOKENS
    assert answer.first_s >= SPEED.time_to_first_token_s
    assert answer.took_s >= SPEED.time_to_first_token_s + (TOKENS - 1) * SPEED.time_per_token_s


async def test_answer_that_is_not_streamed_has_no_tokens_to_time(engine: System) -> None:
    whole = Question(model=FAKE_MODEL, tokens=TOKENS, stream=False)
    seen = await keep_asking(engine.door, whole, clients=3, answers=7)
    assert [(answer.frames, answer.gaps_s) for answer in seen] == [(0, [])] * 7


async def test_client_that_leaves_is_gone_after_some_tokens(engine: System) -> None:
    leaving = Question(model=FAKE_MODEL, tokens=10_000, leave_after=3)
    async with client() as http:
        answer = await ask(http, engine.door, leaving)
    assert 3 <= answer.frames < 10_000


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


async def test_system_that_does_not_answer_is_named(engine: System) -> None:
    closed = System("the closed one", Door(url="http://127.0.0.1:1"), engine.processes)
    for asking in (
        scenarios.warm([engine, closed], QUESTION),
        scenarios.one_client([engine, closed], QUESTION, rounds=1),
        scenarios.many_clients([engine, closed], QUESTION, clients=1, answers=1, rounds=1),
    ):
        with pytest.raises(aiohttp.ClientError) as told:
            await asking
        assert "the closed one" in told.value.__notes__[0]


async def test_more_and_more_clients_round_by_round(engine: System) -> None:
    twin = System("twin", engine.door, engine.processes)
    rounds = scenarios.levels([engine, twin], QUESTION, answers={1: 1, 3: 6}, rounds=2)
    seen = [
        (clients, [one.system for one in done], done[0].answers) async for clients, done in rounds
    ]
    first, second = ["bare engine", "twin"], ["twin", "bare engine"]
    assert seen == [(1, first, 1), (3, first, 6), (1, second, 1), (3, second, 6)]


def test_system_that_does_not_start_says_why() -> None:
    # There is no such number: the server ends with words about it.
    with (
        pytest.raises(AssertionError, match="invalid float value: 'soon'"),
        bare_fake(Speed(time_to_first_token_s="soon", time_per_token_s=0)),  # type: ignore[arg-type]
    ):
        pass


async def test_slow_streams_are_open_at_once() -> None:
    slow = Speed(time_to_first_token_s=0.1, time_per_token_s=0.25)
    with bare_fake(slow) as engine:
        (held,) = await scenarios.many_streams(
            [engine], FAKE_MODEL, streams=8, ramp_s=1.0, gap_s=slow.time_per_token_s
        )
    assert (held.completed, held.open_at_once) == (8, 8)


async def test_an_engine_that_was_at_rest_is_woken_up_before_it_is_measured(
    engine: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = []

    async def noted(http: aiohttp.ClientSession, door: Door, question: Question) -> Answer:
        tokens.append(question.tokens)
        return await ask(http, door, question)

    monkeypatch.setattr(scenarios, "ask", noted)
    await scenarios.one_client([engine], QUESTION, rounds=2, rest_s=0.01)
    assert tokens == [1, TOKENS, 1, TOKENS]


async def test_figures_of_a_system_that_is_the_bare_engine_itself(engine: System) -> None:
    twin = System("twin", engine.door, engine.processes)
    findings = Findings(engine="fake", load_before=0.0)
    findings.latencies = await scenarios.one_client([engine, twin], QUESTION, rounds=4)
    findings.throughputs["4 clients"] = await scenarios.many_clients(
        [engine, twin], QUESTION, clients=4, answers=8, rounds=2
    )
    findings.held = await scenarios.many_streams(
        [twin], FAKE_MODEL, streams=5, ramp_s=0.05, gap_s=0.5
    )
    assert findings.latencies[0].added_ttft_p50_ms == 0
    assert [one.system for one in findings.throughputs["4 clients"]].count("twin") == 2
    assert (findings.held[0].completed, findings.held[0].stalled) == (5, 0)
    # The engine is faster than the scenario was told, so nothing was open when it looked.
    assert findings.held[0].open_at_once == 0
    findings.notes = ["All of it on one desk."]
    page = markdown(findings, None)
    assert "\nAll of it on one desk.\n" in page
    assert page.count("| twin |") == 3


def test_flame_graph_names_no_folder_of_the_machine() -> None:
    here = Path.cwd()
    graph = (
        f">{here}/.venv/bin/py-spy record --pid 7 --output /tmp/x.svg</text>"
        f"<title>run ({here}/serve_app/a.py:1) (2 samples, 1%)</title>"
        f"<title>b ({here}/.venv/lib/python3.11/site-packages/ray/b.py:1) (2 samples)</title>"
        "<title>c (/root/x/lib/python3.11/asyncio/c.py:1)</title>"
    )
    assert without_paths(graph) == (
        ">py-spy record</text>"
        "<title>run (serve_app/a.py:1) (2 samples, 1%)</title>"
        "<title>b (ray/b.py:1) (2 samples)</title>"
        "<title>c (asyncio/c.py:1)</title>"
    )
