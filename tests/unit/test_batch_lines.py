"""The parts of batches that need no database: lines, verdicts, turns."""

from __future__ import annotations

import uuid
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.batches.batch import (
    Line,
    LineState,
    OpenBatch,
    Status,
    principal_from_json,
    principal_to_json,
)
from serve_app.batches.results import result_line
from serve_app.batches.rotation import Rotation
from serve_app.batches.validation import MAX_ERRORS, LineChecker, LineSplitter
from serve_app.batches.verdict import MAX_ATTEMPTS, MAX_WAIT_S, Finished, Postponed, judge
from serve_app.batches.words import LineWords
from serve_app.completions.collected import Answered
from serve_app.config import GatewayConfig, LimitPolicy
from serve_app.identity.principal import Permission, Principal
from serve_app.records import PrincipalKind

CHAT = "/v1/chat/completions"
ADA = Principal(
    id="ada",
    kind=PrincipalKind.USER,
    permissions=frozenset({Permission.USER}),
    models=frozenset({"small"}),
    roles=frozenset({"team-a"}),
)


def config(**changes: Any) -> GatewayConfig:
    models = [{"name": "small", "app": "s"}, {"name": "secret", "app": "t"}]
    return GatewayConfig.model_validate({"models": models} | changes)


def batch(batch_id: str = "batch_1", owner: str = "ada") -> OpenBatch:
    return OpenBatch(
        id=batch_id,
        owner=owner,
        principal=ADA,
        endpoint=CHAT,
        status=Status.IN_PROGRESS,
        input_file_id="file-1",
        output_expires_after_s=None,
        overdue=False,
        settled=False,
    )


# Lines.


@given(st.lists(st.binary(max_size=12).filter(lambda b: b"\n" not in b), max_size=8), st.data())
def test_lines_are_the_same_however_they_are_cut(lines: list[bytes], data: st.DataObject) -> None:
    text = b"\n".join(lines)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    splitter = LineSplitter(max_bytes=8)
    found: list[tuple[int, bytes | None]] = []
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        found += splitter.feed(text[begin:end])
    found += splitter.last()
    wanted = [line if len(line) <= 8 else None for line in lines]
    if wanted and wanted[-1] == b"":
        wanted.pop()
    assert found == list(enumerate(wanted, start=1))


def line(**changes: Any) -> bytes:
    body = {"model": "small", "messages": []}
    return orjson.dumps({"custom_id": "a", "method": "POST", "url": CHAT, "body": body} | changes)


def checker(**changes: Any) -> LineChecker:
    return LineChecker(config(**changes), ADA, CHAT)


def test_a_good_line_keeps_its_body_and_its_number() -> None:
    check = checker()
    request = check.check(7, line(body={"model": "small", "messages": [], "seed": 1.5}))
    assert request is not None
    assert (request.number, request.custom_id) == (7, "a")
    assert orjson.loads(request.body) == {"model": "small", "messages": [], "seed": 1.5}
    assert (check.errors(), check.total, check.model) == ([], 1, "small")


def test_a_model_that_the_owner_may_not_use_is_an_error() -> None:
    check = checker()
    assert check.check(1, line(body={"model": "secret"})) is None
    [error] = check.errors()
    assert (error["code"], error["line"], error["param"]) == ("model_not_found", 1, "body.model")


@pytest.mark.parametrize("name", ["stream", "background"])
def test_an_answer_must_be_whole(name: str) -> None:
    check = checker()
    assert check.check(1, line(body={"model": "small", name: True})) is None
    [error] = check.errors()
    assert (error["code"], error["param"]) == ("unsupported_parameter", f"body.{name}")
    assert check.check(2, line(body={"model": "small", name: False})) is not None


@pytest.mark.parametrize("custom_id", [None, 1, "", "x" * 513, "a\x00b"])
def test_wrong_custom_ids(custom_id: object) -> None:
    check = checker()
    assert check.check(1, line(custom_id=custom_id)) is None
    assert [error["code"] for error in check.errors()] == ["invalid_custom_id"]


def test_deep_and_long_lines_are_errors() -> None:
    check = checker()
    # Deeper than what orjson writes, but not than what it reads.
    nested = b'{"model": "small", "messages": ' + b"[" * 600 + b"]" * 600 + b"}"
    raw = b'{"custom_id":"a","method":"POST","url":"/v1/chat/completions","body":' + nested + b"}"
    assert check.check(1, raw) is None
    assert check.check(2, None) is None
    assert [error["code"] for error in check.errors()] == ["invalid_json_line", "line_too_long"]


def test_a_line_that_is_no_utf8_is_an_error() -> None:
    check = checker()
    assert check.check(1, b'{"custom_id": "\xff"}') is None
    assert [error["code"] for error in check.errors()] == ["invalid_json_line"]


def test_a_field_that_is_named_twice_is_an_error() -> None:
    check = checker()
    twice = line().replace(b'"messages":[]', b'"messages":[],"messages":[1]')
    assert check.check(1, twice) is None
    assert [error["code"] for error in check.errors()] == ["invalid_json_line"]


def test_the_default_model_and_aliases_hold_for_batches_too() -> None:
    models = [{"name": "small", "app": "s", "aliases": ["tiny"]}]
    check = checker(models=models, default_model="small")
    assert check.check(1, line(body={"messages": []})) is not None
    assert check.check(2, line(custom_id="b", body={"model": "tiny", "messages": []})) is not None
    assert check.errors() == []


def test_the_list_of_errors_is_bounded() -> None:
    check = checker()
    number = 0
    while not check.full:
        number += 1
        check.check(number, b"x")
    assert number == MAX_ERRORS == len(check.errors())


def test_reading_stops_after_too_many_lines() -> None:
    check = checker(batches={"max_lines": 2})
    for number in range(1, 4):
        assert not check.full
        check.check(number, line(custom_id=str(number)))
    assert check.full
    assert [error["code"] for error in check.errors()] == ["too_many_requests"]


# Verdicts.


def taken(**changes: Any) -> Line:
    values: dict[str, Any] = {
        "batch": batch(),
        "number": 3,
        "custom_id": "a",
        "body": b"{}",
        "claim": uuid.uuid4(),
        "attempts": 0,
        "waits": 0,
        "revoked": False,
    }
    return Line(**values | changes)


def answered(status: int, body: bytes = b"{}", retry_after_s: float | None = None) -> Answered:
    return Answered(status, "batch_1.3", body, retry_after_s)


def test_a_good_answer_is_the_result() -> None:
    verdict = judge(taken(), answered(200, b'{"a": [1,\n 2]}'))
    assert verdict == Finished(
        state=LineState.COMPLETED,
        status_code=200,
        request_id="batch_1.3",
        response=b'{"a":[1,2]}',
    )


@pytest.mark.parametrize("status", [429, 503])
def test_a_refusal_for_now_costs_no_attempt(status: int) -> None:
    verdict = judge(taken(attempts=2, waits=1), answered(status, retry_after_s=17))
    assert verdict == Postponed(attempts=2, waits=2, delay_s=17)
    for waits in (0, 5, 1000):
        later = judge(taken(waits=waits), answered(status))
        assert isinstance(later, Postponed)
        assert 1 <= later.delay_s <= MAX_WAIT_S


def test_a_budget_that_is_renewed_in_weeks_is_asked_again_before() -> None:
    later = judge(taken(), answered(429, retry_after_s=14 * 86_400))
    assert isinstance(later, Postponed)
    assert later.delay_s == 600


@pytest.mark.parametrize("status", [500, 502, 504])
def test_failures_of_the_engine_are_tried_again_and_then_kept(status: int) -> None:
    attempts = 0
    for _ in range(MAX_ATTEMPTS - 1):
        verdict = judge(taken(attempts=attempts), answered(status))
        assert isinstance(verdict, Postponed)
        attempts = verdict.attempts
    last = judge(taken(attempts=attempts), answered(status))
    assert isinstance(last, Finished)
    assert (last.state, last.status_code) == (LineState.FAILED, status)


@pytest.mark.parametrize("status", [400, 403, 404, 413])
def test_a_refusal_for_good_is_a_failure(status: int) -> None:
    verdict = judge(taken(), answered(status))
    assert isinstance(verdict, Finished)
    assert verdict.state is LineState.FAILED


def test_an_answer_that_is_no_json_is_kept_as_text() -> None:
    verdict = judge(taken(), answered(200, b"no\nJSON \xff"))
    assert isinstance(verdict, Finished)
    assert verdict.response is not None
    assert b"\n" not in verdict.response
    row: Any = {
        "number": 3,
        "state": "completed",
        "status_code": 200,
        "request_id": "r",
        "error_code": None,
        "error_message": None,
    }
    text = LineWords("a", verdict.response).dump()
    written = orjson.loads(orjson.dumps(result_line("batch_ab", row, text)))
    assert written == {
        "id": "batch_req_ab_3",
        "custom_id": "a",
        "response": {"status_code": 200, "request_id": "r", "body": "no\nJSON \ufffd"},
        "error": None,
    }


def test_a_principal_comes_back_as_it_was() -> None:
    key = Principal(
        id="ada",
        kind=PrincipalKind.API_KEY,
        permissions=frozenset({Permission.USER, Permission.AUDITOR}),
        models=None,
        api_key_id=uuid.uuid4(),
        roles=frozenset({"x"}),
        groups=frozenset({"team-a"}),
        client_id="console",
        limits=LimitPolicy(requests_per_minute=3),
    )
    for one in (ADA, key):
        assert principal_from_json(principal_to_json(one)) == one


# Turns.


class Clock:
    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def turns(rotation: Rotation, most: int) -> list[str]:
    """Start lines until there is no turn, or `most` are started."""
    started: list[str] = []
    while len(started) < most and (one := rotation.next()) is not None:
        rotation.started(one.id)
        started.append(one.id)
    return started


def test_owners_take_turns_and_so_do_their_batches() -> None:
    rotation = Rotation(Clock())
    batches = [batch("a1", "ada"), batch("a2", "ada"), batch("a3", "ada"), batch("b1", "bob")]
    rotation.refresh(batches, most=10)
    assert turns(rotation, 8) == ["a1", "b1", "a2", "b1", "a3", "b1", "a1", "b1"]


def test_a_batch_has_no_more_lines_running_than_allowed() -> None:
    rotation = Rotation(Clock())
    rotation.refresh([batch("a1"), batch("a2")], most=2)
    assert sorted(turns(rotation, 10)) == ["a1", "a1", "a2", "a2"]
    rotation.ended("a2", pause_s=None)
    assert turns(rotation, 10) == ["a2"]


def test_a_dry_batch_waits_for_the_next_look() -> None:
    rotation = Rotation(Clock())
    rotation.refresh([batch("a1")], most=2)
    rotation.dry("a1")
    assert rotation.next() is None
    rotation.refresh([batch("a1")], most=2)
    assert turns(rotation, 10) == ["a1", "a1"]


def test_after_a_refusal_it_goes_one_by_one_and_then_faster() -> None:
    clock = Clock()
    rotation = Rotation(clock)
    rotation.refresh([batch("a1")], most=4)
    assert len(turns(rotation, 10)) == 4
    for _ in range(4):
        rotation.ended("a1", pause_s=30)
    assert turns(rotation, 10) == []
    clock.time = 29.9
    assert turns(rotation, 10) == []
    clock.time = 30.0
    assert len(turns(rotation, 10)) == 1
    rotation.ended("a1", pause_s=None)
    assert len(turns(rotation, 10)) == 2
    rotation.ended("a1", pause_s=None)
    rotation.ended("a1", pause_s=None)
    assert len(turns(rotation, 10)) == 4


def test_what_is_gone_is_forgotten() -> None:
    rotation = Rotation(Clock())
    rotation.refresh([batch("a1"), batch("b1", "bob")], most=1)
    assert len(rotation) == 2
    rotation.refresh([batch("b1", "bob")], most=1)
    assert len(rotation) == 1
    rotation.ended("a1", pause_s=None)
    assert turns(rotation, 10) == ["b1"]
