"""A retry with an Idempotency-Key through nginx and two gateways: answered, not generated."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import ConflictError, OpenAI, UnprocessableEntityError

from tests.serve_configs import FAKE_MODEL
from tests.stack_runner import BOOTSTRAP_KEY, RunningStack

TOKENS = 20


@pytest.fixture
def developer(stack: RunningStack) -> OpenAI:
    return OpenAI(base_url=f"{stack.url}/v1", api_key=BOOTSTRAP_KEY, max_retries=0)


def ask(developer: OpenAI, key: str, text: str = "Hello", **more: Any) -> tuple[bytes, str | None]:
    """Return the bytes of an answer, and its Idempotent-Replayed."""
    response = developer.chat.completions.with_raw_response.create(
        model=FAKE_MODEL,
        messages=[{"role": "user", "content": text}],
        max_tokens=TOKENS,
        extra_headers={"Idempotency-Key": key},
        **more,
    )
    return response.http_response.read(), response.headers.get("idempotent-replayed")


def tokens(stack: RunningStack) -> int:
    """Return the tokens that the engine generated until now."""
    return int(stack.engine(FAKE_MODEL)["completion_tokens"])


@pytest.mark.parametrize("stream", [False, True])
def test_retry_gets_the_same_bytes_and_generates_nothing(
    stack: RunningStack, developer: OpenAI, stream: bool
) -> None:
    key = str(uuid.uuid4())
    before = tokens(stack)
    first, replayed = ask(developer, key, stream=stream)
    assert replayed is None
    assert first.endswith(b"data: [DONE]\n\n") is stream
    for _ in range(4):
        assert ask(developer, key, stream=stream) == (first, "true")
    assert tokens(stack) == before + TOKENS
    with pytest.raises(UnprocessableEntityError) as refusal:
        ask(developer, key, "Something else", stream=stream)
    assert refusal.value.code == "idempotency_key_reused"


def test_of_many_at_once_one_is_generated_and_the_clients_wait_for_it(
    stack: RunningStack, developer: OpenAI
) -> None:
    before = tokens(stack)
    key = str(uuid.uuid4())
    patient = developer.with_options(max_retries=30)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: ask(patient, key), range(16)))
    assert len({body for body, _ in answers}) == 1
    assert [replayed for _, replayed in answers].count(None) == 1
    assert tokens(stack) == before + TOKENS


def test_request_under_way_is_a_conflict(stack: RunningStack, developer: OpenAI) -> None:
    key = str(uuid.uuid4())
    messages = [{"role": "user", "content": "A long one"}]
    request: dict[str, Any] = {"model": FAKE_MODEL, "messages": messages, "max_tokens": 500}
    headers = {"Idempotency-Key": key}
    with developer.chat.completions.create(**request, stream=True, extra_headers=headers) as chunks:
        next(iter(chunks))
        with pytest.raises(ConflictError) as refusal:
            developer.chat.completions.create(**request, stream=True, extra_headers=headers)
    assert refusal.value.code == "idempotency_key_in_use"
    assert int(refusal.value.response.headers["retry-after"]) >= 1
