"""The account of one request: how it ended, what it used, how fast it came."""

from __future__ import annotations

import uuid
from typing import Any

import orjson
import pytest

from serve_app.completions.answers import Answers
from serve_app.completions.exchange import Exchange
from serve_app.completions.kinds import Kind
from serve_app.completions.sse import Usage
from serve_app.completions.transcript import Transcript
from serve_app.config import Bodies, ModelEntry
from serve_app.contracts import LeaseGrant
from serve_app.errors import (
    AuthenticationFailed,
    ClientGone,
    DeadlineExceeded,
    EngineFailed,
    InternalError,
    InvalidRequest,
    ModelOverloaded,
    RateLimited,
    RequestError,
)
from serve_app.identity.principal import Permission, Principal
from serve_app.records import Outcome, PrincipalKind, RequestRecord
from serve_app.timing import Stage, Timings


class HeldLease:
    """A lease that was granted."""

    grant = LeaseGrant(address="127.0.0.1:1", token="t", replica_id="r1")

    def close(self) -> None:
        """Do nothing."""


def exchange(route: str = "chat.completions", **more: Any) -> Exchange:
    known = {"request_id": "from-client", "client_address": "10.0.0.1", "bodies": Bodies.FULL}
    return Exchange(route=route, **{**known, **more})


def record(of: Exchange) -> RequestRecord:
    return of.record()


def said(frames: bytes) -> Transcript:
    transcript = Transcript(Answers().pieces)
    transcript.add(frames)
    return transcript


def test_nothing_but_a_request() -> None:
    row = record(exchange())
    assert (row.outcome, row.status, row.error_code) == (Outcome.COMPLETED, 200, None)
    assert (row.request_id, row.client_address) == ("from-client", "10.0.0.1")
    assert (row.prompt_tokens, row.completion_tokens) == (0, 0)
    assert (
        row.principal_id is row.model is row.replica_id is row.auth_ms is row.request_body is None
    )
    assert row.duration_ms >= 0


def test_ids_are_ours_even_where_the_client_repeats_its_own() -> None:
    assert record(exchange()).id != record(exchange()).id


@pytest.mark.parametrize(
    ("error", "leased", "outcome"),
    [
        (AuthenticationFailed(), False, Outcome.REFUSED),
        (RateLimited(), False, Outcome.REFUSED),
        (ModelOverloaded(), False, Outcome.REFUSED),
        (InvalidRequest(), True, Outcome.REFUSED),
        (EngineFailed(), True, Outcome.FAILED),
        (InternalError(), True, Outcome.FAILED),
        (InternalError(), False, Outcome.FAILED),
        (ClientGone(), False, Outcome.CANCELLED),
        (ClientGone(), True, Outcome.CANCELLED),
        (DeadlineExceeded(), False, Outcome.TIMED_OUT),
        (DeadlineExceeded(), True, Outcome.TIMED_OUT),
    ],
)
def test_outcome(error: RequestError, leased: bool, outcome: Outcome) -> None:
    one = exchange(lease=HeldLease() if leased else None)
    one.fail(error)
    row = record(one)
    assert (row.outcome, row.status, row.error_code) == (outcome, error.status, error.code)
    assert row.replica_id == ("r1" if leased else None)


def test_first_reason_stays() -> None:
    one = exchange()
    one.fail(RateLimited())
    one.fail(EngineFailed())
    assert one.status == 429


def test_the_record_says_what_it_cost() -> None:
    priced = ModelEntry(
        name="m",
        app="m",
        price_per_million_prompt_tokens=0.5,
        price_per_million_completion_tokens=2,
    )
    one = exchange(priced=priced, usage=Usage(3, 4))
    one.frames = 4
    assert record(one).cost_micros == one.spent().cost_micros == 10  # 9.5, rounded up
    assert record(exchange(usage=Usage(3, 4))).cost_micros == 0


def test_principal_is_noted() -> None:
    key = uuid.uuid4()
    row = record(
        exchange(
            principal=Principal(
                id="u",
                kind=PrincipalKind.API_KEY,
                permissions=frozenset({Permission.USER}),
                api_key_id=key,
            )
        )
    )
    assert (row.principal_id, row.principal_kind, row.api_key_id) == (
        "u",
        PrincipalKind.API_KEY,
        key,
    )


@pytest.mark.parametrize(
    ("kind", "usage", "frames", "expected"),
    [
        (Kind.CHAT, Usage(3, 2), 9, (3, 2)),
        # No token came: the engine did not count the prompt either.
        (Kind.CHAT, Usage(3, 0), 2, (0, 0)),
        # No usage came: a frame a token, without the opening frame of a chat.
        (Kind.CHAT, None, 6, (0, 5)),
        (Kind.CHAT, None, 0, (0, 0)),
        (Kind.TEXT, None, 5, (0, 5)),
        (Kind.TEXT, None, 0, (0, 0)),
        # What generates nothing is counted with its result.
        (Kind.EMBEDDINGS, Usage(3, 0), 0, (3, 0)),
        (Kind.RERANK, Usage(3, 0), 0, (3, 0)),
        (Kind.SCORE, None, 0, (0, 0)),
        (Kind.TOKENIZE, Usage(0, 0), 0, (0, 0)),
    ],
)
def test_usage(kind: Kind, usage: Usage | None, frames: int, expected: tuple[int, int]) -> None:
    row = record(exchange(kind.route, answers=kind.answers, usage=usage, frames=frames))
    assert (row.prompt_tokens, row.completion_tokens) == expected


@pytest.mark.parametrize(
    ("stream", "tokens", "mean_ms"), [(True, 5, 100.0), (True, 1, None), (False, 5, None)]
)
def test_mean_time_between_tokens(stream: bool, tokens: int, mean_ms: float | None) -> None:
    one = exchange(stream=stream, usage=Usage(1, tokens), first_token_s=10.0, last_token_s=10.4)
    assert record(one).inter_token_mean_ms == mean_ms


def test_mean_time_needs_a_token() -> None:
    assert record(exchange(stream=True, usage=Usage(1, 5))).inter_token_mean_ms is None


def test_token_times() -> None:
    one = exchange()
    one.token_arrived()
    first = one.first_token_s
    one.token_arrived()
    assert one.first_token_s == first
    assert one.last_token_s is not None
    assert first is not None
    assert one.last_token_s >= first
    assert one.timings.time_to_first_token_s == pytest.approx(first - one.started_s)


def timings_of(**stages_s: float) -> Timings:
    """Return a clock on which each stage took so long; a name may end in a number."""
    timings = Timings()
    for name, seconds in stages_s.items():
        lap = timings.lap(Stage(name.rstrip("0123456789")))
        lap.begun_s, lap.ended_s = 100.0, 100.0 + seconds
    return timings


def test_server_timing() -> None:
    # A request that is asked of two replicas waits twice.
    timings = timings_of(authenticate=0.001, lease1=0.2, relay1=1.0, lease2=0.3)
    assert timings.server_timing() == "auth;dur=1.00, queue;dur=500.00"
    assert timings.server_timing(0.6) == "auth;dur=1.00, queue;dur=500.00, total;dur=600.00"
    assert Timings().server_timing(0.6) == "total;dur=600.00"


def test_a_stage_that_fails_is_timed_and_one_under_way_is_not() -> None:
    timings = Timings()
    with pytest.raises(RateLimited), timings.lap(Stage.RESERVE):
        raise RateLimited
    timings.lap(Stage.LEASE).__enter__()
    assert timings.limits_s is not None
    assert timings.queue_s is None
    assert [lap.failed for lap in timings.laps] == [True, False]


@pytest.mark.parametrize(
    ("bodies", "texts"),
    [
        (Bodies.FULL, ('{"a":"é"}', "Yes.")),
        (Bodies.REDACTED, ('{"a":"é"}', "Yes.")),  # the log does it, before it writes them
        (Bodies.METADATA, ("shape", None)),
        (Bodies.NONE, (None, None)),
        (None, (None, None)),
    ],
)
def test_bodies_are_kept_as_the_policy_says(
    bodies: Bodies | None, texts: tuple[str | None, str | None]
) -> None:
    frames = b'data: {"choices":[{"index":0,"delta":{"content":"Yes."}}]}\n\n'
    body = b'{"a":"\xc3\xa9"}'
    one = exchange(
        stream=True, request_body=body, transcript=said(frames), bodies=bodies, shape="shape"
    )
    row = record(one)
    assert (row.bodies, row.request_body, row.response_text) == (bodies, *texts)


def test_request_that_is_no_utf8_is_kept_as_far_as_it_goes() -> None:
    assert record(exchange(request_body=b'{"a":"\xff"}')).request_body == '{"a":"\ufffd"}'


def test_whole_answer() -> None:
    answer = orjson.dumps({"choices": [{"index": 0, "text": "Yes."}]})
    assert record(exchange(answer=answer)).response_text == "Yes."


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("answer", [b"Internal Server Error", b"[]", b"data: {broken\n\n", b"{}"])
def test_an_answer_that_is_no_answer_still_leaves_a_record(stream: bool, answer: bytes) -> None:
    kept = {"transcript": said(answer)} if stream else {"answer": answer}
    assert record(exchange(stream=stream, **kept)).response_text == ""


def test_stream_that_said_nothing_leaves_no_text() -> None:
    transcript = Transcript(Answers().pieces)
    assert record(exchange(stream=True, transcript=transcript)).response_text is None
