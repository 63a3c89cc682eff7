"""Limits as a client sees them: what is refused and how, and what the headers tell."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import httpx
import openai
import pytest

from serve_app.config import GatewayConfig, LimitPolicy
from serve_app.contracts import Scope
from serve_app.settings import PostgresSettings
from tests.integration.fakes import KEY, World, client, principal, until, world

TEXT = "/v1/completions"
PROMPT = "one two three"
# What the fake engine counts of PROMPT, and what is asked for.
PROMPT_TOKENS, MAX_TOKENS = 3, 5
PRICED = {
    "name": "small",
    "app": "model-small",
    "max_tokens": 2000,
    "price_per_million_prompt_tokens": 1,
    "price_per_million_completion_tokens": 10,
}


def ask(**more: Any) -> dict[str, Any]:
    return {"model": "small", "prompt": PROMPT, "max_tokens": MAX_TOKENS, **more}


async def told(http: httpx.AsyncClient, **more: Any) -> tuple[int, int]:
    """Return the status of a request, and the tokens that are left after it was reserved."""
    response = await http.post(TEXT, json=ask(**more))
    return response.status_code, int(response.headers["x-ratelimit-remaining-tokens"])


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    return error


@pytest.mark.parametrize("stream", [True, False])
async def test_headers_show_the_reservation_and_then_what_was_used(stream: bool) -> None:
    limits = {"default": {"tokens_per_minute": 1000}}
    async with world(limits=limits) as served, client(served) as http:
        response = await http.post(TEXT, json=ask(stream=stream))
        assert response.headers["x-ratelimit-limit-tokens"] == "1000"
        assert response.headers["x-ratelimit-reset-tokens"] == "1m0s"
        reserved = 1000 - int(response.headers["x-ratelimit-remaining-tokens"])
        assert reserved >= len(PROMPT) + MAX_TOKENS
        await served.quiet()
        used = served.records[0].prompt_tokens + served.records[0].completion_tokens
        assert used == PROMPT_TOKENS + MAX_TOKENS
        _, left = await told(http, stream=stream)
        assert left == 1000 - used - reserved


async def test_tokens_a_minute_are_refused_until_they_leave_the_window() -> None:
    limits = {"default": {"tokens_per_minute": 150}}
    async with world(limits=limits) as served, client(served) as http:
        while (response := await http.post(TEXT, json=ask())).status_code == 200:
            pass
        assert response.status_code == 429
        assert 1 <= int(response.headers["retry-after"]) <= 60
        error = error_of(response)
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert error["message"].startswith("The limit of 150 tokens per minute for you is reached.")
        # What was refused used nothing, and never came to the engine.
        served.assert_accounts_add_up()


async def test_spent_budget_is_openais_insufficient_quota() -> None:
    limits = {"default": {"tokens_per_day": 150}}
    async with world(limits=limits) as served:
        ai = openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0)

        async def ask_on() -> None:
            while True:
                await ai.completions.create(model="small", prompt=PROMPT, max_tokens=MAX_TOKENS)

        with pytest.raises(openai.RateLimitError) as raised:
            await ask_on()
        await ai.close()
        assert (raised.value.type, raised.value.code) == ("insufficient_quota",) * 2
        assert "budget of 150 tokens per day for you" in raised.value.message
        assert 1 <= int(raised.value.response.headers["retry-after"]) <= 86_400


async def test_money_is_counted_by_the_prices_of_the_model() -> None:
    limits = {"currency": "EUR", "default": {"cost_per_month": "0.0003"}}
    async with world(models=[PRICED], limits=limits) as served, client(served) as http:
        answered = 0
        while (response := await http.post(TEXT, json=ask())).status_code == 200:
            answered += 1
        error = error_of(response)
        assert error["code"] == "insufficient_quota"
        assert "budget of 0.0003 EUR per month for you" in error["message"]
        # 3 of the prompt and 50 of the answer, each time.
        assert answered >= 1
        assert f"{(300 - 53 * answered) / 1e6:f}".rstrip("0") in error["message"]


async def test_what_can_never_fit_is_not_told_to_wait() -> None:
    limits = {"default": {"tokens_per_minute": 100}}
    async with world(limits=limits) as served, client(served) as http:
        response = await http.post(TEXT, json=ask(max_tokens=101))
        assert response.status_code == 400
        assert "retry-after" not in response.headers
        error = error_of(response)
        assert error["code"] == "request_over_limit"
        assert "more than the limit of 100 tokens per minute for you" in error["message"]
        assert not served.limits.reserved


async def test_context_of_the_model_bounds_what_is_reserved() -> None:
    model = {"name": "small", "app": "model-small", "max_tokens": 2000, "context_tokens": 50}
    limits = {"default": {"tokens_per_minute": 1000}}
    async with world(models=[model], limits=limits) as served, client(served) as http:
        assert await told(http, prompt="word " * 40) == (200, 1000 - 50 - MAX_TOKENS)


@pytest.mark.parametrize(
    ("limits", "label"),
    [
        ({"everyone": {"requests_per_minute": 1}}, "everyone together"),
        ({"principals": {"ada": {"requests_per_minute": 1}}}, "you"),
        (
            {"groups": {"lab": {"members": "together", "requests_per_minute": 1}}},
            "the group `lab`",
        ),
        (
            {"roles": {"trial": {"members": "each", "requests_per_minute": 1}}},
            "each of the role `trial`",
        ),
    ],
)
async def test_tightest_scope_wins_and_is_named(limits: dict[str, Any], label: str) -> None:
    wide = {"default": {"requests_per_minute": 100}}
    async with world(limits={**wide, **limits}) as served, client(served) as http:
        served.authenticator.principals[KEY] = principal(
            "ada", groups=frozenset({"lab"}), roles=frozenset({"trial"})
        )
        first = await http.post(TEXT, json=ask())
        assert first.headers["x-ratelimit-limit-requests"] == "1"
        second = await http.post(TEXT, json=ask())
        assert second.status_code == 429
        assert f"1 requests per minute for {label}" in error_of(second)["message"]


async def test_limits_of_a_key_hold_beside_those_of_its_owner() -> None:
    async with world(limits={"default": {"requests_per_minute": 3}}) as served:
        own = LimitPolicy(requests_per_minute=1)
        for name, more in (
            ("one", {"limits": own, "api_key_id": uuid.UUID(int=1)}),
            ("two", {"api_key_id": uuid.UUID(int=2)}),
        ):
            served.authenticator.principals[name] = principal("ada", **more)

        async def asked(key: str) -> httpx.Response:
            async with client(served) as http:
                head = {"authorization": f"Bearer {key}"}
                return await http.post(TEXT, json=ask(), headers=head)

        assert (await asked("one")).status_code == 200
        assert "for your API key" in error_of(await asked("one"))["message"]
        assert [(await asked("two")).status_code for _ in range(3)] == [200, 200, 429]


@pytest.mark.parametrize(("members", "second"), [("together", 429), ("each", 200)])
async def test_group_together_and_each(members: str, second: int) -> None:
    limits = {"groups": {"lab": {"members": members, "requests_per_minute": 1}}}
    async with world(limits=limits) as served, client(served) as http:
        for name in ("ada", "ben"):
            served.authenticator.principals[name] = principal(name, groups=frozenset({"lab"}))
        for name, status in (("ada", 200), ("ben", second), ("ada", 429)):
            response = await http.post(
                TEXT, json=ask(), headers={"authorization": f"Bearer {name}"}
            )
            assert response.status_code == status


async def test_policy_that_is_changed_in_place_holds_at_once() -> None:
    limits = {"default": {"tokens_per_day": 100_000}}
    async with world(limits=limits) as served, client(served) as http:
        assert (await http.post(TEXT, json=ask(max_tokens=100))).status_code == 200
        await served.quiet()
        narrow = served.gateway.config.model_dump(mode="json")
        narrow["limits"]["default"]["tokens_per_day"] = 150
        served.gateway.config = GatewayConfig.model_validate(narrow)
        response = await http.post(TEXT, json=ask())
        # What was used before counts.
        assert error_of(response)["code"] == "insufficient_quota"


async def test_client_that_leaves_pays_what_was_generated() -> None:
    limits = {"default": {"tokens_per_day": 10_000}}
    async with world(limits=limits) as served, client(served) as http:
        body = ask(stream=True, max_tokens=2000)
        async with http.stream("POST", TEXT, json=body) as response:
            async for _ in response.aiter_raw():
                break
        await served.quiet()
        used = served.records[0].prompt_tokens + served.records[0].completion_tokens
        assert 0 < used < 2000
        assert tokens_left(served, 10_000) == 10_000 - used


def tokens_left(served: World, allowed: int, account: str = "principal:user-1") -> int:
    """Return what is left of a budget of tokens for the day."""
    scope = Scope(key=account, label="", tokens_per_day=allowed)
    [state] = served.limits.book.standing([scope])
    return state.window.remaining


async def test_replay_takes_nothing_from_the_limits(database: PostgresSettings) -> None:
    limits = {"default": {"tokens_per_day": 10_000}}
    async with world(database=database, limits=limits) as served, client(served) as http:
        for _ in range(2):
            response = await http.post(TEXT, json=ask(), headers={"idempotency-key": "k"})
            assert response.status_code == 200
        await served.quiet(records=2)
        assert tokens_left(served, 10_000) == 10_000 - PROMPT_TOKENS - MAX_TOKENS


async def test_background_response_is_charged_to_who_asked(database: PostgresSettings) -> None:
    limits = {"default": {"tokens_per_day": 10_000}}
    async with world(database=database, limits=limits) as served, client(served) as http:
        body = {"model": "small", "input": PROMPT, "max_output_tokens": 5, "background": True}
        assert (await http.post("/v1/responses", json=body)).status_code == 200
        await until(lambda: len(served.records) == 2)
        await served.quiet(records=2)
        used = sum(row.prompt_tokens + row.completion_tokens for row in served.records)
        assert used > 0
        assert tokens_left(served, 10_000) == 10_000 - used


async def test_conversation_that_is_continued_is_reserved_too(database: PostgresSettings) -> None:
    limits = {"default": {"tokens_per_minute": 100_000}}
    async with world(database=database, limits=limits) as served, client(served) as http:
        first = {"model": "small", "input": "word " * 400, "max_output_tokens": 5}
        made = (await http.post("/v1/responses", json=first)).json()
        await served.quiet()
        used = served.records[0].prompt_tokens + served.records[0].completion_tokens
        second = {**first, "input": "more", "previous_response_id": made["id"]}
        response = await http.post("/v1/responses", json=second)
        left = int(response.headers["x-ratelimit-remaining-tokens"])
        assert 100_000 - used - left > 5 * 400


async def test_many_at_once_never_pass_a_budget() -> None:
    limits = {"default": {"tokens_per_day": 2000}}
    async with world(limits=limits) as served, client(served) as http:
        answers = await asyncio.gather(*(http.post(TEXT, json=ask()) for _ in range(60)))
        await served.quiet(records=60)
        used = sum(row.prompt_tokens + row.completion_tokens for row in served.records)
        assert 0 < used <= 2000
        assert {answer.status_code for answer in answers} == {200, 429}
        assert tokens_left(served, 2000) == 2000 - used
