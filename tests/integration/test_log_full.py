"""When there is no room for records: requests are refused before the engine is asked, or the
records are dropped and counted. Never silently."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest

from serve_app.errors import LogUnavailable
from serve_app.metrics import NoMetrics
from serve_app.records import Outcome
from tests.integration.fakes import World, client, parse_events, until, world

TEXT = "/v1/completions"
ASK = {"model": "small", "prompt": "p", "max_tokens": 3}


class Dropped(NoMetrics):
    """Counts the records that were dropped."""

    def __init__(self) -> None:
        self.outcomes: Counter[Outcome] = Counter()

    def record_dropped(self, outcome: Outcome) -> None:
        self.outcomes[outcome] += 1


@asynccontextmanager
async def _served(**config: Any) -> AsyncIterator[tuple[World, httpx.AsyncClient, Dropped]]:
    async with world(**config) as made, client(made) as http:
        dropped = Dropped()
        made.gateway.parts = replace(made.gateway.parts, metrics=dropped)
        yield made, http, dropped


@pytest.mark.parametrize("stream", [True, False])
async def test_new_requests_are_refused_before_the_engine_is_asked(
    stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with _served() as (made, http, dropped):
        made.log.full = True
        response = await http.post(TEXT, json=ASK | {"stream": stream})
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "request_log_full"
        assert response.headers["retry-after"] == "10"
        assert not made.pool.hints
        assert not made.records  # what room is left is not for refusals
        assert dropped.outcomes == {Outcome.REFUSED: 1}
        assert "was dropped" in caplog.text
        assert '"request_log_full"' in made.lines.getvalue()
        made.log.full = False
        assert (await http.post(TEXT, json=ASK)).status_code == 200


async def test_requests_that_need_no_model_are_refused_too() -> None:
    async with _served() as (made, http, _):
        made.log.full = True
        for address in ("/v1/models", "/v1/me", "/nowhere"):
            response = await http.get(address)
            assert response.json()["error"]["code"] == "request_log_full"
        assert (await http.get("/health")).status_code == 200


async def test_a_request_that_was_let_in_ends_well_while_there_is_a_reserve() -> None:
    async with _served() as (made, http, dropped):
        made.replica.gate.shut()
        asked = asyncio.create_task(http.post(TEXT, json=ASK | {"stream": True}))
        await made.replica.gate.reached()
        made.log.full = True
        made.replica.gate.open()
        response = await asked
        assert parse_events(response.text)[-1] == "[DONE]"
        await made.quiet()
        assert not dropped.outcomes


async def test_without_a_reserve_its_answer_is_withheld() -> None:
    async with _served() as (made, http, dropped):
        made.log.error = LogUnavailable()
        response = await http.post(TEXT, json=ASK)
        assert response.json()["error"]["code"] == "request_log_unavailable"
        assert not dropped.outcomes


@pytest.mark.parametrize("stream", [True, False])
async def test_by_the_policy_records_are_dropped_and_counted(
    stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with _served(when_log_full="drop") as (made, http, dropped):
        made.log.full = True
        assert (await http.post(TEXT, json=ASK)).status_code == 200
        assert len(made.records) == 1  # the reserve took it
        made.log.error = LogUnavailable()
        response = await http.post(TEXT, json=ASK | {"stream": stream})
        assert response.status_code == 200
        assert "error" not in response.text
        assert dropped.outcomes == {Outcome.COMPLETED: 1}
        assert "was dropped" in caplog.text
        assert len(made.records) == 1


async def test_a_log_that_does_not_answer_is_not_a_full_one() -> None:
    async with _served(when_log_full="drop", record_timeout_s=0.1) as (made, http, dropped):
        made.log.gate.shut()
        response = await http.post(TEXT, json=ASK)
        assert response.json()["error"]["code"] == "request_log_unavailable"
        assert not dropped.outcomes


async def test_what_is_lost_after_the_answer_is_counted() -> None:
    async with _served(durability="async") as (made, http, dropped):
        made.log.error = LogUnavailable()
        assert (await http.post(TEXT, json=ASK)).status_code == 200
        await until(lambda: dropped.outcomes[Outcome.COMPLETED] == 1)
