"""Idempotency keys: what is a key, and what a stored row says to a request."""

from __future__ import annotations

from typing import Any

import pytest

from serve_app.errors import (
    AnswerNotKept,
    IdempotencyConflict,
    IdempotencyMismatch,
    InvalidRequest,
)
from serve_app.stored.idempotency import KeyUse, judge, read_key

USE = KeyUse.of("user-1", "k", "completions", b"{}")


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ("8e03978e-40d5-43dd-bc93-6894a57f9324", "8e03978e-40d5-43dd-bc93-6894a57f9324"),
        ('"8e03978e"', "8e03978e"),
        (r'"say \"yes\" \\ no"', r'say "yes" \ no'),
        ("two words", "two words"),
        ('"', '"'),
        (r'"bad \escape"', r'"bad \escape"'),
        ("x" * 255, "x" * 255),
        (f'"{"x" * 255}"', "x" * 255),
    ],
)
def test_key_is_a_string_with_or_without_quotes(value: str, key: str) -> None:
    assert read_key([value]) == key


def test_no_header_is_no_key() -> None:
    assert read_key([]) is None


@pytest.mark.parametrize(
    "values", [[""], ['""'], ["x" * 256], ["é"], ["a\x00b"], ["a\nb"], ["a\tb"], ["a", "a"]]
)
def test_what_is_no_key_is_refused(values: list[str]) -> None:
    with pytest.raises(InvalidRequest, match="1 to 255 printable ASCII") as refusal:
        read_key(values)
    assert refusal.value.param == "Idempotency-Key"


def row(**changes: Any) -> dict[str, Any]:
    answer = {"status": 200, "media_type": "text/plain", "answer": b"yes"}
    of_use = {"route": USE.route, "fingerprint": USE.fingerprint}
    return {**of_use, **answer, "state": "answered", "age_s": 4.0, **changes}


def test_answer_of_the_same_request() -> None:
    assert judge(USE, row()) == b"yes"


@pytest.mark.parametrize("state", ["answered", "claimed", "not_kept"])
@pytest.mark.parametrize(
    "changes",
    [{"route": "embeddings"}, {"fingerprint": KeyUse.of("u", "k", "r", b"[]").fingerprint}],
)
def test_another_request_is_a_mismatch_in_every_state(state: str, changes: dict[str, Any]) -> None:
    with pytest.raises(IdempotencyMismatch):
        judge(USE, row(state=state, **changes))


@pytest.mark.parametrize(("age_s", "retry_after_s"), [(0.0, 0.0), (4.0, 4.0), (500.0, 30.0)])
def test_request_under_way_names_a_time_that_follows_its_age(
    age_s: float, retry_after_s: float
) -> None:
    with pytest.raises(IdempotencyConflict) as refusal:
        judge(USE, row(state="claimed", age_s=age_s))
    assert not isinstance(refusal.value, AnswerNotKept)
    assert refusal.value.retry_after_s == retry_after_s


def test_answer_that_was_too_long_is_said_to_be() -> None:
    with pytest.raises(AnswerNotKept) as refusal:
        judge(USE, row(state="not_kept", answer=None))
    assert refusal.value.retry_after_s is None
